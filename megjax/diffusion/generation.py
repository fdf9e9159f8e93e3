"""Text to image as pure functions of parameters: prompt features, guided denoising, image decoding."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from megjax.configs import require
from megjax.diffusion import samplers
from megjax.diffusion.samplers import Sampler
from megjax.diffusion.transformer import KeysAndValues
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.keys import threefry
from megjax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Graphs:
    """The static halves of the three networks; `params` is the dict of their parameters under the same names."""

    text_encoder: nnx.GraphDef
    unet: nnx.GraphDef
    vae: nnx.GraphDef
    scaling_factor: float


def encode_prompts(graphs: Graphs, params: PyTree, ids: Int[Array, "b l"], clip_skip: int = 0) -> Float[Array, "b l e"]:
    """Text features of token ids."""
    return nnx.merge(graphs.text_encoder, params["text_encoder"])(ids, clip_skip)


def prompt_features(
    graphs: Graphs,
    params: PyTree,
    ids: Int[Array, "b l"],
    negative_ids: Int[Array, "b l"] | None = None,
    clip_skip: int = 0,
) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"] | None]:
    """Text features of prompts and, from the same batched call, of negative prompts (None without)."""
    if negative_ids is None:
        return encode_prompts(graphs, params, ids, clip_skip), None
    both = encode_prompts(graphs, params, jnp.concatenate([ids, negative_ids]), clip_skip)
    return both[: len(ids)], both[len(ids) :]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The model as a function of scaled latents, for the text features that `texts` was made of.

    With `guided`, the first half of the texts is negative and the output negative + guidance_scale * (positive -
    negative), both from one batched call (Ho and Salimans 2022, eq. 6, with diffusers' meaning of the scale: 1 is no
    guidance).
    """

    unet: UNet2DConditionModel
    texts: list[list[KeysAndValues]]
    guided: bool
    guidance_scale: Float[Array, ""] | float

    def __call__(self, x: Float[Array, "b h w c"], timestep: Shaped[Array, "*b"]) -> Float[Array, "b h w c"]:
        """Model output at one timestep, or one for each of the latents."""
        return self._guide(x, self.unet.shifts(jnp.broadcast_to(timestep, x.shape[:1])))

    def at_steps(self, timesteps: Shaped[Array, " n"]) -> Callable[[Array, Array], Array]:
        """(scaled latents, i) -> model output at timesteps[i]; what depends on timesteps only is computed once."""
        table = self.unet.shifts(timesteps)
        return lambda x, i: self._guide(x, [shift[i][None] for shift in table])

    def _guide(self, x, shifts):
        if not self.guided:
            return self.unet.denoise(x, shifts, self.texts)
        shifts = [shift if len(shift) == 1 else jnp.concatenate([shift, shift]) for shift in shifts]
        both = constrain(jnp.concatenate([x, x]), ("batch",))
        without, given = jnp.split(self.unet.denoise(both, shifts, self.texts), 2)
        return without + self.guidance_scale * (given - without)


def denoiser_for(
    graphs: Graphs,
    params: PyTree,
    positive: Float[Array, "b l e"],
    negative: Float[Array, "b l e"] | None,
    guidance_scale: Float[Array, ""] | float,
) -> Denoiser:
    """The denoiser for these text features, guided if there are negative ones."""
    unet = nnx.merge(graphs.unet, params["unet"])
    guided = negative is not None
    context = jnp.concatenate([negative, positive]) if guided else positive
    return Denoiser(unet, unet.texts(context), guided, guidance_scale)


def image_keys(key: Key[Array, ""], batch: int) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """Keys of the initial noise and of the sampler's noise of each image: they depend on `key` and its index only."""
    key = threefry(key)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.arange(batch))
    return keys[:, 0], keys[:, 1]


def generate_latents(
    graphs: Graphs,
    params: PyTree,
    sampler: Sampler,
    key: Key[Array, ""],
    ids: Int[Array, "b l"],
    *,
    shape: tuple[int, int, int],
    negative_ids: Int[Array, "b l"] | None = None,
    guidance_scale: Float[Array, ""] | float = 1.0,
    initial_noise: Float[Array, "b h w c"] | None = None,
    sampler_noise: Float[Array, "n b h w c"] | None = None,
    clip_skip: int = 0,
    stop: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Float[Array, "b h w c"]:
    """Latents [b h w c] of `shape`, as the U-Net sees them; image i depends on `key`, i and its prompt only.

    `initial_noise` (unit variance) and `sampler_noise` (for stochastic samplers) replace what `key` would draw. With
    `stop` only so many steps are taken, and the latents are variance preserving at the noise level
    `samplers.alpha_bar(sampler, stop)`. Outside of `guidance_interval`, a share of the sampler's model calls from the
    first on, there is no guidance and half the work (Kynkaanniemi et al., "Applying guidance in a limited interval
    improves sample and distribution quality in diffusion models", NeurIPS 2024). ValueError for an interval that is
    not within [0, 1].
    """
    noise_keys, step_keys = image_keys(key, ids.shape[0])
    if initial_noise is None:
        initial_noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(noise_keys)
    positive, negative = prompt_features(graphs, params, ids, negative_ids, clip_skip)
    x, state, end = samplers.scale_initial(sampler, initial_noise), None, sampler.num_steps if stop is None else stop
    draws = {"key": step_keys if sampler_noise is None else None, "noise": sampler_noise}
    for start, until, guided in _guided_parts(end, sampler.num_steps, guidance_interval):
        denoiser = denoiser_for(graphs, params, positive, negative if guided else None, guidance_scale)
        x, state = samplers.denoise(denoiser, sampler, x, start=start, stop=until, state=state, **draws)
    return x if stop is None else samplers.to_vp(sampler, x, stop)


def _guided_parts(end: int, num_steps: int, interval: tuple[float, float]) -> list[tuple[int, int, bool]]:
    """(start, stop, guided) of the parts of steps 0 to `end`."""
    low, high = interval
    require(0 <= low <= high <= 1, "guidance_interval", interval, "(low, high) with 0 <= low <= high <= 1")
    first, last = round(low * num_steps), round(high * num_steps)
    parts = [(0, first, False), (first, last, True), (last, num_steps, False)]
    return [(start, min(stop, end), guided) for start, stop, guided in parts if start < min(stop, end)]


def in_batches(function: Callable, values: Float[Array, "n ..."], batch_size: int | None) -> Array:
    """`function` over the leading axis of `values`, at most `batch_size` at a time, which bounds its memory."""
    count = values.shape[0]
    if batch_size is None or count <= batch_size:
        return function(values)
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    chunks = -(-count // batch_size)
    padding = [(0, chunks * batch_size - count)] + [(0, 0)] * (values.ndim - 1)
    values = jnp.pad(values, padding).reshape(chunks, batch_size, *values.shape[1:])
    results = jax.lax.map(function, values)
    return results.reshape(chunks * batch_size, *results.shape[2:])[:count]


def decode(
    graphs: Graphs, params: PyTree, latents: Float[Array | np.ndarray, "b h w c"], batch_size: int | None = None
) -> Float[Array, "b H W 3"]:
    """Images in [0, 1], decoded at most `batch_size` at a time (None: all at once)."""
    vae = nnx.merge(graphs.vae, params["vae"])

    def images(z):
        return jnp.clip(0.5 * vae.decode(z / graphs.scaling_factor) + 0.5, 0.0, 1.0)

    return in_batches(images, latents, batch_size)


def encode(
    graphs: Graphs, params: PyTree, images: Float[Array | np.ndarray, "b H W 3"], batch_size: int | None = None
) -> Float[Array, "b h w c"]:
    """Mean latents of images in [0, 1], scaled as the U-Net sees them."""
    vae = nnx.merge(graphs.vae, params["vae"])
    return in_batches(lambda x: graphs.scaling_factor * vae.encode(2.0 * x - 1.0)[0], images, batch_size)
