"""Tests of the fit loop: it learns, resumes to the bit, and refuses a folder that belongs to another run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import training
from megjax.training import FitConfig, fit

TARGET = np.array([1.0, -2.0, 0.5], np.float32)
CONFIG = FitConfig(num_steps=60, learning_rate=0.1, warmup_steps=5, log_every=7, steps_per_dispatch=4, ema_decay=0.9)


def loss_fn(params, data, key):
    noise = 0.01 * jax.random.normal(key, (3,))
    error = jnp.sum(jnp.square(params["w"] - data + noise))
    return error, {"distance": jnp.sqrt(error)}


def run(folder, config=CONFIG, **options):
    return fit(loss_fn, {"w": jnp.zeros(3)}, jnp.asarray(TARGET), config, folder, **options)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_states(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_minimises_and_logs(tmp_path):
    run(tmp_path)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert log[-1]["loss"] < 0.01 * log[0]["loss"]
    assert {"loss", "distance", "grad_norm"} <= log[0].keys()
    assert any((tmp_path / "tensorboard").iterdir())
    assert "Total: 3" in (tmp_path / "parameters.txt").read_text()


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_the_size_of_a_dispatch_does_not_change_the_draws(tmp_path, per_dispatch):
    config = FitConfig(**{**CONFIG.__dict__, "steps_per_dispatch": per_dispatch})
    reference = run(tmp_path / "a", FitConfig(**{**CONFIG.__dict__, "steps_per_dispatch": 7}))
    np.testing.assert_allclose(run(tmp_path / "b", config).params["w"], reference.params["w"], rtol=1e-5)


def test_resume_is_bit_exact(tmp_path):
    whole = run(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(state):
        if int(state.step) == 28:
            raise Stop

    config = FitConfig(**{**CONFIG.__dict__, "checkpoint_minutes": 0.0})
    with pytest.raises(Stop):
        run(tmp_path / "halves", config, on_checkpoint=stop)
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 35, "loss": 9}\n{"step": 4')  # rows after the checkpoint, the last one torn by the kill
    assert_equal_states(run(tmp_path / "halves", config), whole)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_a_killed_process_resumes_to_the_same_end(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        import time
        from pathlib import Path
        import test_training as t
        config = t.FitConfig(**{{**t.CONFIG.__dict__, "checkpoint_minutes": 0.0}})
        t.run(Path(sys.argv[1]), config, on_checkpoint=lambda state: time.sleep(0.3))
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "killed")], env=environment)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "14").is_dir() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    config = FitConfig(**{**CONFIG.__dict__, "checkpoint_minutes": 0.0})
    assert_equal_states(run(tmp_path / "killed", config), run(tmp_path / "whole", config))


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


def test_one_and_two_devices_agree_and_resume_each_other(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        from pathlib import Path
        from megjax.runtime import use_cpu_devices
        use_cpu_devices(2)
        import jax
        import test_training as t
        assert jax.device_count() == 2
        config = t.FitConfig(**{{**t.CONFIG.__dict__, "checkpoint_minutes": 0.0}})
        def stop(state):
            if int(state.step) == 28:
                sys.exit()
        t.run(Path(sys.argv[1]) / "whole", config, num_shards=2)
        t.run(Path(sys.argv[1]) / "half", config, num_shards=2, on_checkpoint=stop)
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    config = FitConfig(**{**CONFIG.__dict__, "checkpoint_minutes": 0.0})
    alone = run(tmp_path / "alone", config, num_shards=2)
    finished = run(tmp_path / "whole", config, num_shards=2)  # restored from two devices, nothing left to do
    resumed = run(tmp_path / "half", config, num_shards=2)
    # Sixty Adam steps carry float32 rounding on; parameters are of size 1.
    np.testing.assert_allclose(finished.params["w"], alone.params["w"], atol=1e-5)
    np.testing.assert_allclose(resumed.params["w"], alone.params["w"], atol=1e-5)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_equal_states(run(tmp_path), first)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_another_run_in_the_folder_is_refused(tmp_path):
    run(tmp_path, description={"model": "a"})
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        run(tmp_path, description={"model": "b"})
    with pytest.raises(ValueError, match=r"other settings \(fit\.num_steps\)"):
        run(tmp_path, FitConfig(**{**CONFIG.__dict__, "num_steps": 61}), description={"model": "a"})


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
