"""Losses of the training stages; each draws its own batch, so that a step is a function of parameters and key."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from megjax.data import scenes
from megjax.diffusion.schedules import add_noise, velocity
from megjax.diffusion.vae import AutoencoderKL
from megjax.keys import threefry
from megjax.metrics import scenenet

KL_WEIGHT = 3e-5
"""Weight of the posterior's KL divergence per latent number (nats) against the squared error of pixels in [-1, 1]:
small, as in Rombach et al. (2022), so that the latents stay informative yet near unit scale."""
CAPTION_DROPOUT = 0.1
"""Share of captions replaced by the empty one, which teaches the unconditional model (Ho and Salimans 2022)."""


def draw_scenes(
    key: Key[Array, ""], batch: int, image_size: int, split: str = "train"
) -> tuple[scenes.Scene, Float[Array, "b s s 3"]]:
    """A batch of scenes and their pictures in [0, 1]."""
    scene_key, render_key = jax.random.split(threefry(key))
    drawn = jax.vmap(lambda k: scenes.sample_scene(k, split))(jax.random.split(scene_key, batch))
    render = jax.vmap(lambda k, scene: scenes.render(k, scene, image_size))
    return drawn, render(jax.random.split(render_key, batch), drawn)


def vae_loss(graph: nnx.GraphDef, batch: int, image_size: int) -> Callable:
    """Reconstruction error plus a weak KL divergence to the unit Gaussian (Kingma and Welling 2014, eq. 7 and 10)."""

    def loss_fn(params, data, key):
        del data
        draw_key, noise_key = jax.random.split(threefry(key))
        _, images = draw_scenes(draw_key, batch, image_size)
        images = 2.0 * images - 1.0
        vae: AutoencoderKL = nnx.merge(graph, params)
        mean, log_variance = vae.encode(images)
        noise = jax.random.normal(noise_key, mean.shape, jnp.float32)
        decoded = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise)
        error = jnp.mean(jnp.square(decoded - images))
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        return error + KL_WEIGHT * divergence, {"mse": error, "kl": divergence}

    return loss_fn


def scenenet_loss(graph: nnx.GraphDef, batch: int, image_size: int) -> Callable:
    """Cross-entropy of the attributes of real renders, slightly noised so that generated images are not foreign.

    Half of each batch has held-out combinations: the classifier measures, so it must not favour those that the
    generator was trained on.
    """

    def loss_fn(params, data, key):
        del data
        train_key, held_out_key, level_key, noise_key = jax.random.split(threefry(key), 4)
        halves = (
            draw_scenes(train_key, batch - batch // 2, image_size),
            draw_scenes(held_out_key, batch // 2, image_size, "held_out"),
        )
        drawn, images = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
        level = jax.random.uniform(level_key, (batch, 1, 1, 1), jnp.float32, maxval=0.1)
        noisy = images + level * jax.random.normal(noise_key, images.shape, jnp.float32)
        labels = jax.vmap(scenes.labels)(drawn)
        mask = scenenet.slot_mask(labels)
        _, logits = nnx.merge(graph, params)(noisy)
        right = (scenenet.labels_from_logits(logits) == labels) & mask
        return scenenet.loss(logits, labels, mask), {"accuracy": right.sum() / mask.sum()}

    return loss_fn


def unet_loss(
    graphs: tuple[nnx.GraphDef, nnx.GraphDef],
    alpha_bars: Float[np.ndarray, " t"],
    scaling_factor: float,
    latent_shape: tuple[int, int, int],
    batch: int,
    empty_ids: Int[Array, " l"],
) -> Callable:
    """Mean squared error of the velocity (Salimans and Ho 2022, section 4) of noised latents, text encoder included.

    `data` holds the posterior `mean` and `log_variance` of each training image, latents [h w c] as rows [n h*w*c],
    which a TPU draws without copying the set, and the `ids` [n p l] of its captions; `alpha_bars` is the schedule's
    host table. A step draws images, captions, posterior samples, timesteps and noise.
    """

    def loss_fn(params, data, key):
        keys = jax.random.split(threefry(key), 6)
        count, phrasings = data["ids"].shape[:2]
        rows = jax.random.randint(keys[0], (batch,), 0, count, jnp.int32)
        ids = data["ids"][rows, jax.random.randint(keys[1], (batch,), 0, phrasings, jnp.int32)].astype(jnp.int32)
        dropped = jax.random.bernoulli(keys[2], jnp.float32(CAPTION_DROPOUT), (batch, 1))
        ids = jnp.where(dropped, empty_ids[None], ids)
        mean, log_variance = (data[name][rows].reshape(-1, *latent_shape) for name in ("mean", "log_variance"))
        posterior_noise = jax.random.normal(keys[3], mean.shape, jnp.float32)
        clean = scaling_factor * (mean + jnp.exp(0.5 * log_variance) * posterior_noise)
        timesteps = jax.random.randint(keys[4], (batch,), 0, len(alpha_bars), jnp.int32)
        noise = jax.random.normal(keys[5], clean.shape, jnp.float32)
        text_encoder, unet = (nnx.merge(g, p) for g, p in zip(graphs, params, strict=True))
        predicted = unet(add_noise(alpha_bars, clean, noise, timesteps), timesteps, text_encoder(ids))
        return jnp.mean(jnp.square(predicted - velocity(alpha_bars, clean, noise, timesteps))), {}

    return loss_fn
