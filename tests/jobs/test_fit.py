"""The fit loop on many devices and processes, told to stop, killed, or alone: the same numbers as undisturbed."""

import functools
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from megjax import runtime, sharding, termination, training
from megjax.processes import gather
from megjax.sharding import MeshConfig, fsdp_specs, make_mesh
from megjax.training import data_parallel
from tests.checks import assert_equal_losses, assert_equal_trees, metric_rows
from tests.test_training import CONFIG, EVERY_LOG, run

pytestmark = pytest.mark.slow


def signal_before(step, number):
    """From now on this process sends itself a signal before the chunk of training that starts at a step."""
    make_chunk = training.make_chunk

    def signalling(config, loss_fn):
        chunk = make_chunk(config, loss_fn)

        def run(state, *rest):
            if int(state.step) == step:
                os.kill(os.getpid(), number)
            return chunk(state, *rest)

        return run

    training.make_chunk = signalling


def train(folder, stop=None, config=CONFIG, **options):
    """Train to the end, or until a signal at a step; prints that the end was reached."""
    if stop is not None:
        signal_before(*stop)
    state = run(folder, config, **options)
    print("finished", int(state.step))


def checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(processes, tmp_path):
    """The signal comes in the chunk from step 16 to 20; log lines are at 14 and 21."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    assert "finished" not in processes.start(train, stopped, (16, signal.SIGTERM)).finish(-signal.SIGTERM)
    assert checkpoints(stopped) == [20]
    assert [row["step"] for row in metric_rows(stopped)] == [7, 14]
    assert_equal_trees(run(stopped), run(whole))
    assert metric_rows(stopped) == metric_rows(whole)


def test_a_killed_process_resumes_to_the_same_end(processes, tmp_path):
    killed = tmp_path / "killed"
    processes.start(train, killed, (16, signal.SIGKILL), EVERY_LOG).finish(-signal.SIGKILL)
    assert checkpoints(killed) == [7, 14]
    assert_equal_trees(run(killed, EVERY_LOG), run(tmp_path / "whole", EVERY_LOG))


def train_two_halves(folder):
    """On two devices, once to the end and once until a checkpoint on the way."""
    assert jax.device_count() == 2
    run(folder / "whole", EVERY_LOG, num_shards=2)

    def stop(state):
        if int(state.step) == 28:
            raise SystemExit

    run(folder / "half", EVERY_LOG, num_shards=2, on_checkpoint=stop)


def test_one_and_two_devices_agree_and_resume_each_other(processes, tmp_path):
    processes.run(train_two_halves, tmp_path, devices=2)
    alone, finished, resumed = (run(tmp_path / name, EVERY_LOG, num_shards=2) for name in ("alone", "whole", "half"))
    # Sixty Adam steps carry float32 rounding on; parameters are of size 1.
    np.testing.assert_allclose(finished.params["w"], alone.params["w"], atol=1e-5)
    np.testing.assert_allclose(resumed.params["w"], alone.params["w"], atol=1e-5)


def split_parameters():
    """Loss, gradients and data seen by a device: parameters whole everywhere, split over four devices, and on one."""

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
    plain, split = (
        jax.jit(jax.value_and_grad(data_parallel(loss_fn, 8, mesh, **options), has_aux=True))
        for options in ({}, {"param_specs": specs})
    )
    (a, _), grads = plain(params, data, key)
    (b, _), sharded = split(placed, data, key)
    draws = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
    on_one = jax.vmap(jax.value_and_grad(lambda *args: loss_fn(*args)[0]), (None, None, 0))(params, data, draws)
    c, expected = jax.tree.map(lambda x: x.mean(0), on_one)
    np.testing.assert_allclose([a, b], c, rtol=1e-5)
    for name in params:  # of size 1, summed in another order
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads[name], sharded[name], rtol=1e-5, atol=1e-7)
    assert "fsdp" in sharded["w"].sharding.spec
    own = jax.jit(data_parallel(loss_fn, 8, mesh, data_specs=PartitionSpec(("data", "fsdp"))))
    assert float(own(params, data, key)[1]["size"]) == 5.0


def test_split_parameters_give_the_same_loss_and_gradients(processes):
    processes.run(split_parameters, devices=8)


def train_together(folder, stop=None):
    """`train` as one of two processes, the second of which gets the signal."""
    sharding.start_processes()
    train(folder, stop if jax.process_index() else None, num_shards=2)


def test_two_processes_train_as_one(processes, tmp_path):
    """Two processes of one device each, one of them told to stop on the way, against one process."""
    two, one = tmp_path / "two", tmp_path / "one"
    for process in processes.start_job(train_together, two, (16, signal.SIGTERM)):
        process.finish(-signal.SIGTERM)
    assert checkpoints(two) == [20]
    for process in processes.start_job(train_together, two):
        assert "finished 60" in process.finish()
    run(one, num_shards=2)
    assert_equal_losses(two, one, 1e-3)


def train_in_a_command(folder, killed_at=None):
    """A command of two processes; the second may be killed at a step, and is then missed after five seconds."""
    if killed_at is not None:
        runtime.start_processes = functools.partial(sharding.start_processes, heartbeat_seconds=5)
        if sharding.find_processes().process_id == 1:
            signal_before(killed_at, signal.SIGKILL)
    runtime.command("train", lambda: run(folder, EVERY_LOG, num_shards=2), many=True)


def test_a_lost_process_ends_the_other_and_the_run_goes_on(processes, tmp_path):
    """One of two processes is killed after step 14; both start again and end as one process does."""
    two, one = tmp_path / "two", tmp_path / "one"
    survivor, killed = processes.start_job(train_in_a_command, two, 16)
    killed.finish(-signal.SIGKILL)
    assert survivor.wait() not in (0, -signal.SIGKILL)
    told = "process 1 of 2 .from 0. is lost: not heard of for 5 seconds|another process of the job may be lost"
    assert re.search(told, survivor.err), survivor.err[-2000:]
    assert set(checkpoints(two)) >= {7, 14}
    for process in processes.start_job(train_in_a_command, two):
        process.finish()
    run(one, EVERY_LOG, num_shards=2)
    assert_equal_losses(two, one, 1e-3)


def fail_at_step_4(folder, error):
    """A command of two processes that train, the second of which fails after its second checkpoint."""

    def loss_fn(params, data, key):
        return jnp.square(params - jax.random.normal(key)), {}

    def saved(state):
        if jax.process_index() == 1 and int(state.step) >= 4:
            raise error("no more")

    config = training.FitConfig(num_steps=40, warmup_steps=1, log_every=2, checkpoint_minutes=0)
    runtime.command(
        "train.it", lambda: training.fit(loss_fn, jnp.float32(1), (), config, folder, on_checkpoint=saved), many=True
    )


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError])
def test_an_error_in_one_process_ends_both(processes, tmp_path, error):
    first, second = processes.start_job(fail_at_step_4, tmp_path / "run", error)
    assert first.wait() != 0 and second.wait() != 0
    assert "no more" in second.err
    assert re.search("no more|another process|another task died", first.err), first.err[-2000:]


def join_and_stop():
    """Two processes meet; the second tells itself to end, the first, which others of a job depend on, stays."""
    sharding.start_processes()
    gather()
    if jax.process_index() == 0:
        signal.pause()
    os.kill(os.getpid(), signal.SIGTERM)
    print("went on")


def test_sigterm_ends_a_process_of_a_job_that_does_not_train(processes):
    """JAX's preemption service only notes it."""
    _, told = processes.start_job(join_and_stop)
    assert "went on" not in told.finish(-signal.SIGTERM)


def train_with_a_stuck_partner(folder):
    """At step 16 the second process stops for good, while the first, which is told to end, waits for it."""
    sharding.start_processes()
    termination.SECONDS_TO_AGREE = 1.0
    signal_before(16, signal.SIGSTOP if jax.process_index() else signal.SIGTERM)
    run(folder, num_shards=2)


def test_sigterm_ends_a_process_whose_partner_is_stuck(processes, tmp_path):
    waiting, _ = processes.start_job(train_with_a_stuck_partner, tmp_path / "run")
    waiting.finish(128 + signal.SIGTERM)
    assert "told to end, and waited" in waiting.err
