"""Mobile edge generation as one pure function, from prompts to the images that devices receive.

The steps are prompt uplink, inference at the edge server (ES), channel state information (CSI), seed coding, power
allocation, transmission, seed decoding, and image generation at the user's device (UE), after R. Zhong, X. Mu, M. Jaber
and Y. Liu, "Enabling distributed generative artificial intelligence in 6G: mobile edge generation", arXiv 2409.05870.
The uplink carries token ids, free of errors.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Int, Integer, Key, PyTree

from megjax.configs import require
from megjax.diffusion import generation
from megjax.diffusion.generation import Graphs
from megjax.diffusion.refine import refine
from megjax.diffusion.samplers import SAMPLERS, Sampler
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.keys import threefry
from megjax.numerics import squared_magnitude
from megjax.power import Problem
from megjax.pytrees import value_of
from megjax.system.protocol import Code, Link, Source
from megjax.system.realise import realisation_keys, realise, scaled_load, symbol_shares
from megjax.units import linear_to_db, noise_var_from_snr_db

_DEVICE_STREAM = 2**32 - 1
"""Stream of the link's key that is no image's, of noise that the device draws."""


class BlockWeights(NamedTuple):
    """Importance of the blocks at effective SNRs `snr_db` [g], linear between them, constant beyond."""

    snr_db: Float[Array, " g"]
    weights: Float[Array, "g t"]

    def at(self, snr_db: Float[Array, ""]) -> Float[Array, " t"]:
        """Weights [t] at an effective SNR."""
        return jax.vmap(lambda column: jnp.interp(snr_db, self.snr_db, column), in_axes=1)(self.weights)


class Delivery(NamedTuple):
    """Results of r realisations of the link for each of b images."""

    images: Float[Array, "b r H W 3"] | None
    latents: Float[Array, "b r h w c"] | None
    """Received latents as the device decodes them; None where pixels are sent."""
    gains: Complex[Array, "b r t"]
    power: Float[Array, "b r t"]
    """Power of the blocks, absolute: P times what the policy gave."""
    num_symbols: Float[Array, " b"]
    energy: Float[Array, "b r"]
    """Radiated energy, sum over blocks of (symbols in the block) p_t, in units of one symbol at power 1."""
    error: Float[Array, "b r"] | None = None
    """Squared errors of the latents under a bound, which gives no latents; None otherwise."""


class Transmission(NamedTuple):
    """A whole simulation: what the server made and what the devices have."""

    source: Source
    delivery: Delivery


@dataclasses.dataclass(frozen=True)
class Simulator:
    """`simulator(key, params, ids, snr_db) -> Transmission`, a pure function to be jitted, vmapped and differentiated.

    Made by `make_simulator`. `params` holds the parameters it was made with: `text_encoder`, `unet`, `vae` of the
    pipeline, `codec` (the link's), `fading` and `policy`, all pytrees, and `weights` of the blocks. Images depend on
    the key and their number only, gains and noise on the key, the image's number and the realisation's: schemes and
    policies that are given the same key are compared on the same draws. `energy` is that of one image in units of one
    symbol at power 1, None for mean power 1.
    """

    params: dict[str, PyTree] = dataclasses.field(repr=False, compare=False)
    graphs: Graphs
    link: Link
    sampler: Sampler
    scheduler: SchedulerConfig
    latent_shape: tuple[int, int, int]
    guided: bool
    server_steps: int | None = None
    device_steps: int = 0
    device_sampler: str = "ddim"
    energy: float | None = None
    peak_power: float = float("inf")
    decode_batch: int | None = None

    def __hash__(self):
        return hash((self.link, self.latent_shape, self.guided, self.server_steps, self.device_steps, self.energy))

    def __call__(
        self,
        key: Key[Array, ""],
        params: dict[str, PyTree],
        ids: Int[ArrayLike, "b l"],
        snr_db: Float[ArrayLike, ""],
        *,
        negative_ids: Int[ArrayLike, "b l"] | None = None,
        guidance_scale: Float[ArrayLike, ""] = 3.0,
        realisations: int = 1,
    ) -> Transmission:
        """All steps, for token ids of b prompts and so many realisations of the link each; `snr_db` is 1 / sigma^2.

        A guided simulator needs `negative_ids`; `make_simulator` leaves those of the empty prompt in
        `params["negative_ids"]`.
        """
        image_key, link_key = jax.random.split(threefry(key))
        source = self.infer(image_key, params, ids, negative_ids, guidance_scale)
        images, draws = jnp.arange(len(source.latents)), jnp.arange(realisations)
        options = {"negative_ids": negative_ids, "guidance_scale": guidance_scale}
        return Transmission(source, self.deliver(link_key, params, source, ids, snr_db, images, draws, **options))

    def infer(
        self,
        key: Key[Array, ""],
        params: dict[str, PyTree],
        ids: Int[ArrayLike, "b l"],
        negative_ids: Int[ArrayLike, "b l"] | None = None,
        guidance_scale: Float[ArrayLike, ""] = 3.0,
    ) -> Source:
        """Prompt uplink and inference at the ES: latents, finished images, latents of the server's share of steps."""
        ids = jnp.asarray(ids)
        options = {
            "shape": self.latent_shape,
            "negative_ids": self._negative(params, ids, negative_ids),
            "guidance_scale": guidance_scale,
        }
        denoise = functools.partial(generation.generate_latents, self.graphs, params, self.sampler)
        latents = denoise(key, ids, **options)
        partial = latents
        if self.server_steps is not None:
            partial = denoise(jax.random.clone(key), ids, stop=self.server_steps, **options)
        return self.source(params, latents, partial)

    def source(
        self,
        params: dict[str, PyTree],
        latents: Float[Array, "b h w c"],
        partial: Float[Array, "b h w c"] | None = None,
    ) -> Source:
        """What the server has, from latents that were generated before."""
        images = generation.decode(self.graphs, params, latents, self.decode_batch)
        return Source(latents, images, latents if partial is None else partial)

    def deliver(
        self,
        key: Key[Array, ""],
        params: dict[str, PyTree],
        source: Source,
        ids: Int[ArrayLike, "b l"] | None,
        snr_db: Float[ArrayLike, ""],
        images: Integer[ArrayLike, " b"],
        realisations: Integer[ArrayLike, " r"],
        *,
        negative_ids: Int[ArrayLike, "b l"] | None = None,
        guidance_scale: Float[ArrayLike, ""] = 3.0,
        generate: bool = True,
        code: Code | None = None,
    ) -> Delivery:
        """From CSI to image generation at the UE, over these realisations of the link for images of these numbers.

        The latents are the server's, whatever the number of realisations. `ids` are read by devices that denoise;
        without `generate` no image is made of received latents, and `images` is None. `code` is what the link makes of
        the source at this SNR, if that is known already.
        """
        code = self.link.code(value_of(params["codec"]), source, snr_db, self.energy) if code is None else code
        received, gains, power = self._over_the_air(key, params, code, snr_db, images, realisations)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), received)
        decoded = self.link.decode(value_of(params["codec"]), flat, code.shared)
        size = gains.shape[:2]
        count = jnp.broadcast_to(code.num_symbols, size[:1])
        energy = count[:, None] * jnp.sum(symbol_shares(self.link)[None, None] * power, -1)
        if self.link.result == "error":
            return Delivery(None, None, gains, power, count, energy, decoded.reshape(size))
        if self.link.result == "noisy":
            keys = self._device_keys(key, images, realisations)
            decoded = self._denoise(params, decoded, ids, size, negative_ids, guidance_scale, keys)
        shown, latents = self._generate(params, decoded, generate)
        return Delivery(
            None if shown is None else shown.reshape(*size, *shown.shape[1:]),
            None if latents is None else latents.reshape(*size, *latents.shape[1:]),
            gains,
            power,
            count,
            energy,
        )

    def allocate(
        self, params: dict[str, PyTree], code: Code, gains: Complex[Array, " t"], noise_var: Float[Array, ""]
    ) -> Float[Array, " t"]:
        """Power allocation for known gains, in units of P; without a policy the load that the code asks for."""
        policy = value_of(params["policy"])
        if policy is None:
            return jnp.minimum(scaled_load(self.link, code.load), self.peak_power)
        snr, table = 1 / noise_var, params["weights"]
        weights = jnp.ones_like(code.load) if table is None else table.at(linear_to_db(snr))
        problem = Problem(snr, weights, jnp.float32(gains.shape[0]), jnp.float32(self.peak_power))
        return policy.allocate(squared_magnitude(gains), problem)

    def _over_the_air(self, key, params, code: Code, snr_db, images, realisations):
        """CSI, power allocation and transmission: what is received [b r ...], gains and absolute power [b r t]."""
        images, realisations = jnp.asarray(images), jnp.asarray(realisations)
        size = images.shape[0], realisations.shape[0]
        flat = jnp.repeat(images, size[1]), jnp.tile(realisations, size[0])
        keys = realisation_keys(key, *flat).reshape(size)
        noise_var = noise_var_from_snr_db(snr_db)
        codec, fading = value_of(params["codec"]), value_of(params["fading"])

        def one(key, payload, mean_power):
            scaled = noise_var / mean_power
            mine = code._replace(payload=payload)

            def allocate(gains):
                return self.allocate(params, code, gains, scaled)

            made = realise(self.link, codec, key, mine, fading, scaled, allocate)
            return made.received, made.gains, mean_power * made.power

        each = 0 if jnp.ndim(code.mean_power) else None
        over_images = jax.vmap(jax.vmap(one, (0, None, None)), (0, 0, each))
        return over_images(keys, code.payload, code.mean_power)

    def _device_keys(self, key, images, realisations) -> Key[Array, " n"] | None:
        """Keys of the noise that the device's sampler draws for every reception, None if it draws none."""
        if not SAMPLERS.find(self.device_sampler).stochastic:
            return None
        flat = jnp.repeat(jnp.asarray(images), len(realisations)), jnp.tile(jnp.asarray(realisations), len(images))
        return realisation_keys(jax.random.fold_in(threefry(key), _DEVICE_STREAM), *flat)

    def _denoise(self, params, noisy, ids, size, negative_ids, guidance_scale, keys):
        """Clean latents of all b * r receptions, by the device's steps."""
        require(ids is not None, "ids", ids, "given, as the device denoises for the same prompts")
        ids = jnp.asarray(ids)
        features = generation.prompt_features(self.graphs, params, ids, self._negative(params, ids, negative_ids))
        positive, negative = (None if f is None else jnp.repeat(f, size[1], axis=0) for f in features)
        denoiser = generation.denoiser_for(self.graphs, params, positive, negative, guidance_scale)
        start = noisy.latents, noisy.alpha_bar
        return refine(denoiser, self.scheduler, *start, self.device_steps, self.device_sampler, keys)

    def _generate(self, params, decoded, generate: bool):
        """Images, if they are asked for, and latents, unless pixels were sent, of all b * r receptions."""
        if self.link.result == "images":
            return decoded, None
        return generation.decode(self.graphs, params, decoded, self.decode_batch) if generate else None, decoded

    def _negative(self, params, ids, negative_ids):
        if not self.guided:
            return None
        given = params["negative_ids"] if negative_ids is None else negative_ids
        return jnp.broadcast_to(jnp.asarray(given), ids.shape)


@functools.partial(jax.jit, static_argnames=("simulator", "realisations"))
def run(
    simulator: Simulator,
    key: Key[Array, ""],
    params: dict[str, Any],
    ids: Int[ArrayLike, "b l"],
    snr_db: Float[ArrayLike, ""],
    guidance_scale: Float[ArrayLike, ""],
    realisations: int,
) -> Transmission:
    """A simulator as one compiled program, which is kept for the next call of an equal one."""
    return simulator(key, params, ids, snr_db, guidance_scale=guidance_scale, realisations=realisations)
