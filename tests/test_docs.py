"""Runs the Python snippets of the documentation that need no other model, rollouts cut short."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = [
    (name, block)
    for name in ("README.md", "docs/channel.md", "docs/codec.md", "docs/power.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    if "channel" in block or "make_ppo" in block or "megjax.simulate" in block
]
LONG = ("megjax.simulate", "SeedCodec", "make_ppo", "10_000_000")
"""Marks of the snippets that take seconds."""
CASES = [
    pytest.param(block, id=name, marks=[pytest.mark.slow] if any(mark in block for mark in LONG) else [])
    for name, block in SNIPPETS
]
PAGES = ("architecture", "channel", "codec", "performance", "power", "system", "tutorial")


@pytest.mark.parametrize("page", ["README.md", "tpu_configs/README.md", *(f"docs/{name}.md" for name in PAGES)])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_there_are_snippets():
    assert [name for name, _ in SNIPPETS] == [
        *["README.md"] * 2,
        *["docs/channel.md"] * 3,
        "docs/codec.md",
        "docs/power.md",
        "docs/power.md",
    ]


@pytest.mark.parametrize("block", CASES)
def test_snippet(block, unchecked, fast_compile):
    names = {}
    exec(compile(block.replace("10_000_000", "3_000").replace("200_000", "3_000"), "snippet", "exec"), names)
    if "stats" in names:
        # More SNR, less outage; a stronger line of sight, fewer fades.
        mean = np.asarray(names["stats"].mean)
        mean = mean[:, 0] if mean.ndim == 2 else mean
        assert names["stats"].count == 3000 and np.all(np.diff(mean) < 0) and mean[0] < 1
    if "ofdm" in names:
        assert names["gains"].shape == (16,)
    if "drop" in names:
        assert names["drop"].snr_db.shape == (1000,)
    if "decoded" in names:
        error = np.square(names["decoded"] - names["latents"]).sum() / np.square(names["latents"]).sum()
        assert error < 0.5 and np.isclose(np.mean(names["weights"]), 1.0, atol=1e-5)
    if "optimum" in names:
        assert names["error"] == pytest.approx(9.2525, abs=4 * 0.81 / np.sqrt(10_000))  # the value of 10^5 episodes
    if "sent" in names:
        assert names["sent"].delivery.images.shape == (1, 4, 64, 64, 3)
    if "train" in names:
        assert names["metrics"]["return"].shape == (4,) and int(names["state"].step) == 4
