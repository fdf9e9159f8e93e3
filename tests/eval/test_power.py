"""Tests of the power scripts at tiny size: training, its files, the tables and plots of the evaluation."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from eval import power
from megjax.channel import RayleighFading
from megjax.codec import SeedCodec
from megjax.numerics import squared_magnitude
from megjax.power import LearnedPower, StaticPower, gain_law, load_table, power_problem
from train import power as training

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one tiny run for equal weights."""
    folder = tmp_path_factory.mktemp("runs")
    args = training.Arguments("tiny", weights="equal", folder=folder / "power-equal-rayleigh-0")
    training.main(args)
    return folder


@pytest.mark.slow
def test_training_writes_a_policy_that_loads(runs):
    run = runs / "power-equal-rayleigh-0"
    policy = LearnedPower.from_pretrained(run / "model", 16)
    assert policy.config.hidden == (8,)
    assert {"metrics.jsonl", "parameters.txt", "config.json", "seconds.json"} <= {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_the_evaluation_writes_tables_and_plots(runs, tmp_path, monkeypatch):
    every = power.settings
    monkeypatch.setattr(power, "settings", lambda args: [one for one in every(args) if "Markov" not in one.name])
    frame = power.run(power.Arguments(runs=runs, num=200, snr_db=(0.0,), output=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.parquet",
        "tables.md",
        "policies.png",
        "map.png",
        "learning.png",
    }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "results.parquet"), frame)
    equal = frame[(frame.setting == "Rayleigh, equal weights")].set_index("policy")
    assert equal["return"]["equal"] == pytest.approx(equal["return"]["static"], rel=1e-6)
    assert equal.recovered["dp"] == pytest.approx(1) and equal.recovered["equal"] == 0
    assert equal["return"]["clairvoyant"] > equal["return"]["dp"] > equal["return"]["equal"]
    assert "dp" not in set(frame[frame.setting.str.startswith("Jakes")].policy)
    assert (frame[frame.policy == "clairvoyant"].causal == False).all()  # noqa: E712
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| ppo |" in text or "ppo:" in text


def test_codec_weights_are_those_of_the_codec_and_equal_ones(monkeypatch):
    monkeypatch.setattr(training, "RATES", (1.0, 4.0))
    monkeypatch.setattr(training, "GRID_DB", (-15.0, 10.0))
    codec = SeedCodec.from_pretrained("scenes")
    table = training.codec_weights(codec, 16)
    assert table.shape == (len(training.RATES) + 1, len(training.GRID_DB), 16)
    np.testing.assert_allclose(table.mean(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(table[-1], 1)
    assert table[1, 0, 0] > table[1, 0, -1]
    np.testing.assert_allclose(table[0, 1], codec.block_weights(codec.num_symbols(1.0), 10.0, 16), rtol=1e-5)


def test_the_bundled_policy_beats_the_open_loop():
    codec, policy = SeedCodec.from_pretrained("scenes"), LearnedPower.from_pretrained("scenes", 16)
    problem = power_problem(10.0, 16, np.asarray(codec.block_weights(32, 10.0)))
    keys = jax.random.split(jax.random.key(9), 4000)
    gains = jax.jit(jax.vmap(lambda key: squared_magnitude(RayleighFading().sample(key, 16))))(keys)
    learned, static = (
        np.asarray(power.returns(one, gains, problem))
        for one in (policy, StaticPower(load_table(gain_law(RayleighFading()))))
    )
    gain = learned - static
    assert gain.mean() > 4 * gain.std() / np.sqrt(4000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "image", "weights": "equal"}, "--reward"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
        ({"envs": 7}, "minibatches"),
        ({"start": "nowhere"}, "power policy"),
    ],
)
def test_bad_arguments_of_training(changes, message, tmp_path):
    args = dataclasses.replace(training.Arguments("tiny", weights="equal", folder=tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=message):
        training.main(args)
