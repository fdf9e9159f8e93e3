"""The trainings of codec, model and policy: the same on several devices and by two processes."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from megjax import runtime
from megjax.codec.fitting import Conditions
from megjax.codec.recipe import PRESETS as CODECS
from megjax.codec.recipe import train_codec
from megjax.data import scenes
from megjax.ldm.recipe import PRESETS as MODELS
from megjax.power.recipe import PRESETS as POLICIES
from megjax.power.recipe import train_power
from megjax.training import FitConfig
from tests import models
from tests.checks import assert_equal_losses
from tests.processes import run_module

pytestmark = pytest.mark.slow


def weights(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


def codec(folder):
    """Two draws a step; the first process keeps the weights."""
    latents = np.random.default_rng(0).normal(size=(64, 4, 4, 4)).astype(np.float32)
    recipe = dataclasses.replace(
        CODECS["tiny"],
        codec=dataclasses.replace(CODECS["tiny"].codec, latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8),
        conditions=Conditions(groups=1, group_size=16),
        fit=FitConfig(num_steps=4, warmup_steps=1, log_every=2, learning_rate=1e-3),
        num_shards=2,
    )
    trained = train_codec(recipe, latents, None, folder / "codec")
    if jax.process_index() == 0:
        trained.save_pretrained(folder / "model", dtype=np.float32)


def codec_together(folder):
    runtime.command("train", lambda: codec(folder), many=True)


def test_codec_on_two_processes(processes, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    processes.run(codec, one, devices=2, fast_compile=True)
    for process in processes.start_job(codec_together, two, fast_compile=True):
        process.finish()
    # Parameters are kept as float16 after training, which the rounding of sums may tip over by one step.
    first, second = weights(one), weights(two)
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=2e-3, atol=2e-3, err_msg=name)
    assert_equal_losses(one / "codec", two / "codec", 1e-4)


def policy(folder):
    recipe = POLICIES["tiny"]
    train_power(recipe, *recipe.environment(), folder / "power")


def test_one_and_eight_devices_agree(processes, tmp_path):
    for devices in (1, 8):
        processes.run(policy, tmp_path / str(devices), devices=devices)
    assert_equal_losses(tmp_path / "1" / "power", tmp_path / "8" / "power", 1e-5)


def alone_and_together(processes, folder, target, *words):
    """What two processes print of a script that together they run in folder/two, after one has run it in folder/one."""
    processes.run(target, *words, "--folder", folder / "one", fast_compile=True)
    together = processes.start_job(target, *words, "--folder", folder / "two", fast_compile=True)
    return [process.finish() for process in together]


def test_power_on_two_processes(processes, tmp_path):
    """Both compute the same; the first prints, and writes what is no checkpoint."""
    words = ("train.power", "--preset", "tiny", "--weights", "equal")
    first, second = alone_and_together(processes, tmp_path, run_module, *words)
    assert "policy written to" in first and "policy written to" not in second
    assert_equal_losses(tmp_path / "one", tmp_path / "two", 1e-5)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def train_small_model(*words):
    """`train.ldm` with the smallest networks."""
    MODELS["tiny"], scenes.render = models.small_recipe(), models.noise_picture
    run_module("train.ldm", *words)


def test_a_model_on_two_processes(processes, tmp_path):
    """The autoencoder, its latents and the U-Net, whose draws are divided over devices or processes."""
    words = ("--preset", "tiny", "--stage", "unet", "--shards", "2")
    alone_and_together(processes, tmp_path, train_small_model, *words)
    for stage in ("vae", "unet"):
        assert_equal_losses(tmp_path / "one" / stage, tmp_path / "two" / stage, 1e-3)
