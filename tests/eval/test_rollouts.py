"""Tests of the tour of channel rollouts: its points lie on theory, its files are there, bad arguments are named."""

import json

import numpy as np
import pytest
from PIL import Image

from eval import rollouts

MODULATIONS = ("bpsk", "64qam")
"""Each takes a program a channel; all of them are held to theory in tests/channel."""


@pytest.fixture(scope="module")
def result(tmp_path_factory, module_unchecked, fast_compile):
    folder = tmp_path_factory.mktemp("channel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.channel, "MODULATIONS", MODULATIONS)
        return folder, rollouts.run(rollouts.Arguments(num=600, chunk=256, output=folder))


@pytest.mark.slow
def test_rates_lie_on_theory(result):
    folder, rows = result
    assert json.loads((folder / "ber.json").read_text()) == rows
    assert len(rows) == 2 * len(MODULATIONS) * len(rollouts.SNRS_DB)
    # Where at least 20 realisations have errors the mean is nearly normal; 4.5 standard errors for some 25 points.
    scored = [r for r in rows if r["theory"] > 1e-3]
    assert len(scored) > 20
    for row in scored:
        assert abs(row["ber"] - row["theory"]) < 4.5 * row["standard_error"], row


@pytest.mark.slow
def test_picture(result):
    colours = np.asarray(Image.open(result[0] / "channel.png").convert("RGB")).reshape(-1, 3)
    assert np.unique(colours, axis=0).shape[0] > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num=0), "num is 0"),
        (dict(chunk=-1), "chunk is -1"),
        (dict(seed=-1), "--seed is -1"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rollouts.run(rollouts.Arguments(**options, output=tmp_path))
