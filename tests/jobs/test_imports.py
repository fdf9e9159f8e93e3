"""What importing the library loads, seen in a new interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import SECONDS

pytestmark = pytest.mark.slow
CODE = """
import sys

def loaded(*names):
    return set(names) & {name.partition(".")[0] for name in sys.modules}

import megjax
assert not loaded("jax", "transformers")
import megjax.channel
assert loaded("jax") and not loaded("transformers", "diffusers", "orbax", "torch", "tensorflow")
import megjax.metrics
assert loaded("clu") and not loaded("transformers", "diffusers", "orbax", "torch", "tensorflow")
sys.modules["gymnasium"] = None
import megjax.power
try:
    import megjax.power.adapters
except ImportError as error:
    print(error)
"""


def test_imports_are_light_and_gymnasium_is_optional():
    command, root = [sys.executable, "-c", CODE], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "megjax.power.adapters needs gymnasium: pip install gymnasium"
