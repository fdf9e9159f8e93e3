"""Training on many devices and processes, and its end by SIGTERM: the same numbers as on one device, undisturbed."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.training import FitConfig, fit

HERE = Path(__file__).parent
HEAD = f"""
import sys
sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
"""
TRAINING = """
import os, signal
import test_training as t
from megjax import training

def train(folder, stop_at=None, num_shards=1):
    make_chunk = training.make_chunk

    def signalling(config, loss_fn):
        chunk = make_chunk(config, loss_fn)

        def run(state, *rest):
            if stop_at is not None and int(state.step) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return chunk(state, *rest)

        return run

    training.make_chunk = signalling
    saved = []
    state = t.run(Path(folder), num_shards=num_shards, on_checkpoint=lambda state: saved.append(int(state.step)))
    print("finished", int(state.step), saved)
    return state
"""


def start(code, *arguments, devices=1):
    head = f"import jax\njax.config.update('jax_num_cpu_devices', {devices})\n"
    command = [sys.executable, "-c", head + HEAD + textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, status=0):
    """What the process printed; it must end with this status."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err[-3000:]
    return out


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(tmp_path):
    """The signal comes in the chunk from step 16 to 20; log lines are at 14 and 21."""
    code = TRAINING + "\nstate = train(sys.argv[1], 16 if sys.argv[2] == 'stop' else None)\n"
    code += "np.save(Path(sys.argv[1]) / 'w.npy', np.asarray(state.params['w']))\n"
    assert "finished" not in finish(start(code, tmp_path / "stopped", "stop"), -signal.SIGTERM)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["20"]
    assert [row["step"] for row in rows(tmp_path / "stopped")] == [7, 14]
    for folder in ("stopped", "whole"):
        assert "finished 60" in finish(start(code, tmp_path / folder, "go"))
    whole, resumed = (np.load(tmp_path / folder / "w.npy") for folder in ("whole", "stopped"))
    np.testing.assert_array_equal(resumed, whole)
    for a, b in zip(rows(tmp_path / "stopped"), rows(tmp_path / "whole"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_the_previous_handler_returns(tmp_path):
    before, during = signal.getsignal(signal.SIGTERM), []

    def loss_fn(params, data, key):
        during.append(signal.getsignal(signal.SIGTERM))
        return jnp.square(params), {}

    fit(loss_fn, jnp.float32(1), (), FitConfig(num_steps=2, warmup_steps=1), tmp_path)
    assert during and before not in during
    assert signal.getsignal(signal.SIGTERM) == before


def test_split_parameters_give_the_same_loss_and_gradients():
    code = """
    from jax.sharding import NamedSharding, PartitionSpec
    from megjax.sharding import MeshConfig, fsdp_specs, make_mesh
    from megjax.training import data_parallel

    def loss_fn(params, data, key):
        x = data[jax.random.randint(key, (4,), 0, len(data))]
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"])), {"size": jnp.float32(len(data))}

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (64, 32)), "v": jax.random.normal(keys[1], (32, 3))}
    data, key = jax.random.normal(keys[2], (40, 64)), jax.random.key(1)
    mesh = make_mesh(MeshConfig(fsdp=4))
    specs = fsdp_specs(params, 4, smallest=1000)
    assert specs == {"w": PartitionSpec("fsdp"), "v": PartitionSpec()}
    placed = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in params.items()}
    plain, split = (jax.jit(jax.value_and_grad(data_parallel(loss_fn, 8, mesh, **options), has_aux=True))
                    for options in ({}, {"param_specs": specs}))
    (a, _), grads = plain(params, data, key)
    (b, _), sharded = split(placed, data, key)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(grads[name], sharded[name], rtol=1e-5, atol=1e-7)
    print(sharded["w"].sharding.spec)
    own = jax.jit(data_parallel(loss_fn, 8, mesh, data_specs=PartitionSpec(("data", "fsdp"))))
    print(float(own(params, data, key)[1]["size"]))
    """
    lines = finish(start(code, devices=8)).splitlines()
    assert "fsdp" in lines[0] and lines[1] == "5.0"


def test_two_processes_train_as_one(tmp_path):
    """Two processes of one device each, one of them told to stop on the way, against one process."""
    code = (
        TRAINING
        + """
from megjax.sharding import start_processes
start_processes(sys.argv[2], 2, int(sys.argv[3]))
stop = 16 if sys.argv[4] == "stop" and sys.argv[3] == "1" else None
train(sys.argv[1], stop, num_shards=2)
"""
    )

    def launch(how):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        return [start(code, tmp_path / "two", address, index, how) for index in range(2)]

    for process in launch("stop"):
        finish(process, -signal.SIGTERM)
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["20"]
    for process in launch("go"):
        assert "finished 60" in finish(process)
    finish(start(TRAINING + "\ntrain(sys.argv[1], num_shards=2)", tmp_path / "one"))
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
