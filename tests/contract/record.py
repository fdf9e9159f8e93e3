"""Record the outputs of every part: `python -m tests.contract.record`, on the CPU as in the tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import checks  # noqa: E402 (reads the settings above)
from tests.contract import parts, schemes, stored  # noqa: E402

if __name__ == "__main__":
    with checks.fast_compile():
        stored.record((*parts.PARTS, *schemes.PARTS))
    print(f"{stored.FOLDER}: {len(list(stored.FOLDER.rglob('*.safetensors')))} parts")
