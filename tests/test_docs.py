"""Runs the Python snippets of the channel documentation, rollouts cut short."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = [
    (name, block)
    for name in ("README.md", "docs/channel.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    if "channel" in block
]


def test_there_are_snippets():
    assert [name for name, _ in SNIPPETS] == ["README.md", "docs/channel.md", "docs/channel.md"]


@pytest.mark.parametrize("block", [block for _, block in SNIPPETS], ids=[name for name, _ in SNIPPETS])
def test_snippet(block):
    names = {}
    exec(compile(block.replace("10_000_000", "3_000"), "snippet", "exec"), names)
    if "stats" in names:
        # More SNR, less outage, and neither certain nor impossible at the ends.
        mean = np.asarray(names["stats"].mean)
        assert names["stats"].count == 3000 and np.all(np.diff(mean) < 0) and mean[0] < 1
    if "gains" in names:
        assert names["gains"].shape == (16,)
    if "drop" in names:
        assert names["drop"].snr_db.shape == (1000,)
