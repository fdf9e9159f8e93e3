"""The trainings of codec, model and policy: the same on one device and on eight, and after the loss of a process."""

import re
import signal
import socket
import time

import pytest
from safetensors.numpy import load_file

from tests.test_parallel import finish, rows, start

CODEC = """
    import dataclasses
    from megjax.codec.fitting import Conditions
    from megjax.codec.recipe import PRESETS, train_codec
    from megjax.training import FitConfig
    latents = np.random.default_rng(0).normal(size=(64, 4, 4, 4)).astype(np.float32)
    small = dataclasses.replace(PRESETS["tiny"].codec, latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8)
    conditions = Conditions(groups=1, group_size=16)
    def codec(folder, fit, num_shards):
        changes = {"codec": small, "conditions": conditions, "fit": fit, "num_shards": num_shards}
        trained = train_codec(dataclasses.replace(PRESETS["tiny"], **changes), latents, None, folder / "codec")
        if jax.process_index() == 0:
            trained.save_pretrained(folder / "model", dtype=np.float32)
"""


def weights(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


def check_codecs(one, other):
    # Parameters are kept as float16 after training, which the rounding of sums may tip over by one step.
    first, second = weights(one), weights(other)
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    check_losses(one / "codec", other / "codec", 1e-4)


def run_on_one_and_eight(code, tmp_path):
    """Folders of a run on one device and of one on eight."""
    folders = [tmp_path / str(devices) for devices in (1, 8)]
    for devices, folder in zip((1, 8), folders, strict=True):
        folder.mkdir()
        assert finish(start(code, folder, devices=devices)).split()[-1] == str(devices)
    return folders


def check_losses(one, other, rel):
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=rel)


@pytest.mark.slow
def test_codec_agrees_on_one_and_eight_devices(tmp_path):
    code = """
    codec(Path(sys.argv[1]), FitConfig(num_steps=4, warmup_steps=1, log_every=2, learning_rate=1e-3), 8)
    print(jax.device_count())
    """
    check_codecs(*run_on_one_and_eight(CODEC + code, tmp_path))


@pytest.mark.slow
def test_model_agrees_on_one_and_eight_devices(tmp_path):
    """With two shards, so on two of the eight: one device compiles the network once a shard."""
    code = """
    from flax import nnx
    from megjax.diffusion.vae import AutoencoderKL
    from megjax.ldm import fitting
    from megjax.ldm.recipe import PRESETS
    recipe = PRESETS["tiny"]
    vae = nnx.split(AutoencoderKL(recipe.vae_config, rngs=nnx.Rngs(0)))
    fitting.train_unet(recipe, Path(sys.argv[1]), vae)
    print(jax.device_count())
    """
    one, eight = run_on_one_and_eight(code, tmp_path)
    check_losses(one / "unet", eight / "unet", 1e-4)


def test_policy_agrees_on_one_and_eight_devices(tmp_path):
    code = """
    from megjax.power.recipe import PRESETS, train_power
    recipe = PRESETS["tiny"]
    train_power(recipe, *recipe.environment(), Path(sys.argv[1]) / "power")
    print(jax.device_count())
    """
    one, eight = run_on_one_and_eight(code, tmp_path)
    check_losses(one / "power", eight / "power", 1e-5)


def test_a_lost_process_ends_the_other_and_the_run_goes_on(tmp_path):
    """One of two processes of four devices each is killed at step 4 of a codec's training; then both start again."""
    code = (
        CODEC
        + """
    import functools, os, signal
    from megjax import runtime, sharding, training
    folder, address, index, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    if address:
        os.environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
        runtime.start_processes = functools.partial(sharding.start_processes, heartbeat_seconds=5)
    make_chunk = training.make_chunk
    def killing(config, loss_fn):
        chunk = make_chunk(config, loss_fn)
        def run(state, *rest):
            if int(state.step) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk(state, *rest)
        return run
    training.make_chunk = killing
    fit = FitConfig(num_steps=6, warmup_steps=1, log_every=2, learning_rate=1e-3, checkpoint_minutes=0)
    runtime.command("train", lambda: codec(folder, fit, 8), many=True)
    """
    )

    def launch(kill):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        arguments = (tmp_path / "two", address)
        return [start(code, *arguments, i, 4 if kill and i else -1, devices=4) for i in range(2)]

    survivor, killed = launch(True)
    finish(killed, -signal.SIGKILL)
    lost = time.monotonic()
    out, err = survivor.communicate(timeout=60)
    assert survivor.returncode not in (0, -signal.SIGKILL) and time.monotonic() - lost < 30
    assert re.search("another process of the job may be lost|another task died", err), err[-2000:]
    assert {path.name for path in (tmp_path / "two" / "codec" / "checkpoints").iterdir()} >= {"2", "4"}
    for process in launch(False):
        finish(process)
    finish(start(code, tmp_path / "one", "", 0, -1, devices=8))
    check_codecs(tmp_path / "one", tmp_path / "two")
