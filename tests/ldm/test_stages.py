"""Tests of the stages' losses, with stand-ins for the networks that make the losses known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.data import scenes
from megjax.diffusion.layers import ShapeRngs
from megjax.ldm import stages
from megjax.ldm.recipe import PRESETS
from megjax.metrics import SceneNet
from tests.checks import within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZE, BATCH, LOG_VARIANCE = 16, 8, -3.0
EMPTY, LENGTH, LEVELS = 0, 6, np.linspace(0.99, 0.01, 10, dtype=np.float32)
WRONG = 3.0


class Copying(nnx.Module):
    """An autoencoder whose latents are `share` times the picture plus `level`."""

    def __init__(self, share, level):
        self.share, self.level = nnx.Param(jnp.float32(share)), nnx.Param(jnp.float32(level))

    def encode(self, images):
        return self.share[...] * images + self.level[...], jnp.full(images.shape, LOG_VARIANCE)

    def decode(self, latents):
        return latents


class MarksEmpty(nnx.Module):
    """A text encoder whose features are 1 for the empty caption and 0 for every other."""

    def __call__(self, ids):
        return (ids == EMPTY).all(axis=1).astype(jnp.float32)


class Constant(nnx.Module):
    """A U-Net that predicts WRONG everywhere for the empty caption and 0 for every other."""

    def __call__(self, noisy, timesteps, features):
        return jnp.broadcast_to(WRONG * features[:, None, None, None], noisy.shape)


def draw_noise(key, batch, image_size, split="train"):
    """Scenes with pictures of noise, in place of `stages.draw_scenes`: renders take long to compile."""
    drawn = jax.vmap(lambda k: scenes.sample_scene(k, split))(jax.random.split(jax.random.fold_in(key, 0), batch))
    return drawn, jax.random.uniform(jax.random.fold_in(key, 1), (batch, image_size, image_size, 3))


def test_autoencoder_loss(monkeypatch):
    monkeypatch.setattr(stages, "draw_scenes", draw_noise)

    def run(key, share, level):
        graph, params = nnx.split(Copying(share, level))
        return stages.vae_loss(graph, BATCH, SIZE)(params, (), key)

    keys = jax.random.split(jax.random.key(0), 2)
    loss, metrics = jax.jit(jax.vmap(run))(keys, jnp.array([1.0, 0.0]), jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(loss, metrics["mse"] + stages.KL_WEIGHT * metrics["kl"], rtol=1e-6)
    # The picture itself: what is left is the posterior's noise. The same mean for all: noise, mean and a picture
    # between -1 and 1, of mean square 1/3. Means of squares spread by less than sqrt(2 / n) of themselves.
    variance, spread = np.exp(LOG_VARIANCE), np.sqrt(2 / (BATCH * SIZE * SIZE * 3))
    np.testing.assert_allclose(metrics["mse"], [variance, variance + 0.25 + 1 / 3], rtol=4 * spread)
    expected = [0.5 * (square + variance - 1 - LOG_VARIANCE) for square in (1 / 3, 0.25)]
    np.testing.assert_allclose(metrics["kl"], expected, rtol=4 * spread)


def test_scenenet_sees_both_splits(monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "draw_scenes", lambda *a: (seen.append((a[1], *a[3:])), draw_noise(*a))[1])
    graph, params = nnx.split(nnx.eval_shape(lambda: SceneNet(PRESETS["tiny"].scenenet_config, ShapeRngs())))
    loss, metrics = jax.eval_shape(stages.scenenet_loss(graph, 5, SIZE), params, (), jax.random.key(0))
    assert seen == [(3,), (2, "held_out")] and loss.shape == metrics["accuracy"].shape == ()


def test_unet_loss():
    """The velocity of unit noise and a unit latent has unit variance at every level; dropped captions add WRONG^2."""
    (text_graph, text), (unet_graph, unet) = nnx.split(MarksEmpty()), nnx.split(Constant())
    factor, rng = 0.5, np.random.default_rng(0)
    data = {
        "mean": jnp.zeros((20, 16)),
        "log_variance": jnp.full((20, 16), -2 * np.log(factor)),
        "ids": jnp.asarray(rng.integers(1, 9, (20, 3, LENGTH)), jnp.int16),
    }
    empty = jnp.full(LENGTH, EMPTY, jnp.int32)
    loss_fn = stages.unet_loss((text_graph, unet_graph), LEVELS, factor, (2, 2, 4), 16, empty)
    losses, _ = jax.jit(jax.vmap(lambda key: loss_fn((text, unet), data, key)))(
        jax.random.split(jax.random.key(0), 1024)
    )
    within_standard_error(losses, 1 + stages.CAPTION_DROPOUT * WRONG**2)
