"""Tests of the fit loop: it learns, resumes to the bit, and refuses a folder that belongs to another run."""

import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import training
from megjax.training import FitConfig, fit
from tests.checks import assert_equal_trees, metric_rows

TARGET = np.array([1.0, -2.0, 0.5], np.float32)
CONFIG = FitConfig(num_steps=60, learning_rate=0.1, warmup_steps=5, log_every=7, steps_per_dispatch=4, ema_decay=0.9)
EVERY_LOG = dataclasses.replace(CONFIG, checkpoint_minutes=0.0)
"""The same, with a checkpoint at every log line."""


def loss_fn(params, data, key):
    noise = 0.01 * jax.random.normal(key, (3,))
    error = jnp.sum(jnp.square(params["w"] - data + noise))
    return error, {"distance": jnp.sqrt(error)}


def run(folder, config=CONFIG, **options):
    return fit(loss_fn, {"w": jnp.zeros(3)}, jnp.asarray(TARGET), config, folder, **options)


def test_it_minimises_and_logs(tmp_path):
    run(tmp_path)
    log = metric_rows(tmp_path)
    assert [row["step"] for row in log] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert log[-1]["loss"] < 0.01 * log[0]["loss"]
    assert {"loss", "distance", "grad_norm"} <= log[0].keys()
    assert any((tmp_path / "tensorboard").iterdir())
    assert "Total: 3" in (tmp_path / "parameters.txt").read_text()


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_the_size_of_a_dispatch_does_not_change_the_draws(tmp_path, per_dispatch):
    config = dataclasses.replace(CONFIG, steps_per_dispatch=per_dispatch)
    reference = run(tmp_path / "a", dataclasses.replace(CONFIG, steps_per_dispatch=7))
    np.testing.assert_allclose(run(tmp_path / "b", config).params["w"], reference.params["w"], rtol=1e-5)


def test_resume_is_bit_exact(tmp_path):
    whole = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(state):
        if int(state.step) == 28:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "halves", EVERY_LOG, on_checkpoint=stop)
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 35, "loss": 9}\n{"step": 4')  # rows after the checkpoint, the last one torn by the kill
    assert_equal_trees(run(tmp_path / "halves", EVERY_LOG), whole)
    assert metric_rows(tmp_path / "halves") == metric_rows(tmp_path / "whole")


def damage(step):
    """Cut every file of a checkpoint's state in half."""
    for path in (step / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_older_one(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "run"
    run(folder, EVERY_LOG)
    checkpoints = folder / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [56, 60]
    damage(checkpoints / "60")
    state = run(folder, EVERY_LOG)
    assert_equal_trees(state, whole)
    told = capsys.readouterr().err
    assert "the checkpoint of step 60 cannot be read (" in told and "going on from step 56" in told
    assert (folder / "damaged-60").is_dir() and (checkpoints / "60").is_dir()
    assert [row["step"] for row in metric_rows(folder)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    for path in checkpoints.iterdir():
        damage(path)
    with pytest.raises(ValueError, match=r"holds no checkpoint that can be read \(step 60: .*; step 56: .*train anew"):
        run(folder, EVERY_LOG)


def test_shards_are_the_mean_of_their_draws():
    key, params, data = jax.random.key(0), {"w": jnp.ones(3)}, jnp.asarray(TARGET)
    mean = jax.jit(jax.value_and_grad(training.data_parallel(loss_fn, 2), has_aux=True))
    (loss, metrics), gradient = mean(params, data, jax.random.clone(key))
    draws = [
        jax.value_and_grad(loss_fn, has_aux=True)(params, data, jax.random.fold_in(jax.random.clone(key), i))
        for i in range(2)
    ]
    np.testing.assert_allclose(loss, sum(draw[0][0] for draw in draws) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["distance"], sum(draw[0][1]["distance"] for draw in draws) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], sum(draw[1]["w"] for draw in draws) / 2, rtol=1e-6)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_equal_trees(run(tmp_path), first)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_another_run_in_the_folder_is_refused(tmp_path):
    run(tmp_path, description={"model": "a"})
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        run(tmp_path, description={"model": "b"})
    with pytest.raises(ValueError, match=r"other settings \(fit\.num_steps\)"):
        run(tmp_path, dataclasses.replace(CONFIG, num_steps=61), description={"model": "a"})


def test_the_step_is_traced_once_for_each_chunk_length(monkeypatch, tmp_path):
    original = training.make_step
    monkeypatch.setattr(training, "make_step", lambda *args: chex.assert_max_traces(original(*args), n=2))
    # Chunks of 4 steps, and of 2 at the end.
    run(tmp_path, FitConfig(num_steps=42, log_every=8, steps_per_dispatch=4, warmup_steps=1))


@pytest.mark.parametrize(
    "values",
    [
        {"num_steps": 0},
        {"learning_rate": 0.0},
        {"warmup_steps": 20_000},
        {"clip_norm": -1.0},
        {"ema_decay": 1.0},
        {"log_every": 0},
        {"steps_per_dispatch": -1},
    ],
)
def test_bad_settings_are_named(values):
    name, value = next(iter(values.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        FitConfig(**values)


def test_the_previous_handler_returns(tmp_path):
    before, during = signal.getsignal(signal.SIGTERM), []

    def loss_fn(params, data, key):
        during.append(signal.getsignal(signal.SIGTERM))
        return jnp.square(params), {}

    fit(loss_fn, jnp.float32(1), (), FitConfig(num_steps=2, warmup_steps=1), tmp_path)
    assert during and before not in during
    assert signal.getsignal(signal.SIGTERM) == before
