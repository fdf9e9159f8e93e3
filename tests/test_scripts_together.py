"""Training scripts as a job of two processes: as one process, and an error in one of them ends both."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.test_parallel import rows

ROOT = Path(__file__).parent.parent


def run(*words, processes=1):
    """Outputs and errors of a script as a job; every process must end with status 0."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = []
    for index in range(processes):
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(job if processes > 1 else {})}
        command = [sys.executable, "-m", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    found = [process.communicate(timeout=900) for process in started]
    for process, (_, err) in zip(started, found, strict=True):
        assert process.returncode == 0, err[-3000:]
    return found


def test_power_on_two_processes(tmp_path):
    """Both compute the same; the first prints, and writes what is no checkpoint."""
    options = ("--preset", "tiny", "--weights", "equal", "--folder")
    run("train.power", *options, tmp_path / "one")
    (first, _), (second, _) = run("train.power", *options, tmp_path / "two", processes=2)
    assert "policy written to" in first and "policy written to" not in second
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = (load_file(next((tmp_path / name / "model").glob("*.safetensors"))) for name in ("one", "two"))
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_a_model_on_two_processes(tmp_path):
    """All stages of the bundled model's recipe at tiny size, the U-Net's draws divided."""
    options = ("--preset", "tiny", "--shards", 2, "--folder")
    run("train.ldm", *options, tmp_path / "one")
    run("train.ldm", *options, tmp_path / "two", processes=2)
    for stage in ("vae", "unet"):
        for a, b in zip(rows(tmp_path / "one" / stage), rows(tmp_path / "two" / stage), strict=True):
            assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert json.loads((tmp_path / "two" / "model" / "model_index.json").read_text())


FAILING = """
import sys
from megjax.runtime import command
from megjax.training import FitConfig, fit
import jax, jax.numpy as jnp

def loss_fn(params, data, key):
    return jnp.square(params - jax.random.normal(key)), dict()

def saved(state):
    if jax.process_index() == 1 and int(state.step) >= 4:
        raise {error}("no more")

config = FitConfig(num_steps=40, warmup_steps=1, log_every=2, checkpoint_minutes=0)
command("train.it", lambda: fit(loss_fn, jnp.float32(1), (), config, sys.argv[1], on_checkpoint=saved), many=True)
"""


@pytest.mark.parametrize("error", ["ValueError", "ZeroDivisionError"])
def test_an_error_in_one_process_ends_both(tmp_path, error):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    started = []
    for index in range(2):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **job, "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, "-c", FAILING.format(error=error), str(tmp_path / "run")]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    begun = time.monotonic()
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert time.monotonic() - begun < 110
    assert all(process.returncode not in (0, None) for process in started), errors
    assert "no more" in errors[1]
    assert any(word in errors[0] for word in ("no more", "another process", "another task died")), errors[0][-2000:]
