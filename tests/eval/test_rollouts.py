"""Tests of the tour of channel rollouts: its points lie on theory, its files are there, bad arguments are named."""

import json

import numpy as np
import pytest

from eval import rollouts


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channel")
    return folder, rollouts.run(rollouts.Arguments(num=600, chunk=256, output=folder))


def test_rates_lie_on_theory(result):
    folder, rows = result
    assert json.loads((folder / "ber.json").read_text()) == rows
    assert len(rows) == 2 * 6 * len(rollouts.SNRS_DB)
    # Where at least 20 realisations have errors the mean is nearly normal; 4.5 standard errors for about 100 points.
    scored = [r for r in rows if r["theory"] > 1e-3]
    assert len(scored) > 50
    for row in scored:
        assert abs(row["ber"] - row["theory"]) < 4.5 * row["standard_error"], row


def test_picture(result):
    import matplotlib.image

    picture = matplotlib.image.imread(result[0] / "channel.png")
    assert picture.shape[1] > 1000 and np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 50


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
