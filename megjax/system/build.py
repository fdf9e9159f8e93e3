"""Simulators from a scheme, a law of fading and a power policy, each by name or as an object."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from megjax.channel import Fading, find_fading
from megjax.codec import SeedCodec
from megjax.codec.coders import Coder
from megjax.configs import require, require_count, require_number
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import as_key
from megjax.power import EqualPower, Policy, check_policy, make_policy
from megjax.pytrees import as_pytree
from megjax.system import simulator as simulators
from megjax.system.protocol import Link
from megjax.system.schemes import NUM_BLOCKS, WEIGHT_GRID_DB, Parts, Scheme, find_scheme, latent_symbols
from megjax.system.simulator import BlockWeights, Simulator, Transmission
from megjax.system.source import SourceStatistics
from megjax.units import check_snr_db

MODES = ("equal_power", "equal_energy")
"""P = 1, or P = K_latent / K, so that every scheme radiates the energy of the raw latent at P = 1."""


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Settings of a simulation that are none of its parts."""

    mode: str = "equal_power"
    """One of `MODES`."""
    num_blocks: int = NUM_BLOCKS
    """Fading blocks per image, T."""
    peak_power: float = float("inf")
    """Largest power of a block in units of P."""
    statistics: SourceStatistics = SourceStatistics()
    """Constants of analog pixels, and of raw latents without a `SeedCodec`."""
    num_steps: int = 25
    """Denoising steps of the server."""
    sampler: str | None = None
    """Sampler of the server; None for the model's own."""
    guided: bool = True
    """Whether denoising is guided, away from a negative prompt."""
    decode_batch: int | None = None
    """Images that the decoder holds at once; None for all."""

    def __post_init__(self):
        require(self.mode in MODES, "mode", self.mode, f"one of {MODES}")
        require(self.peak_power > 0, "peak_power", self.peak_power, "positive")
        fits = self.decode_batch is None or self.decode_batch >= 1
        require(fits, "decode_batch", self.decode_batch, "at least 1, or None for all")

    def energy(self, latent_shape: tuple[int, ...]) -> float | None:
        """Energy of an image in units of one symbol at power 1; None for mean power 1."""
        return float(latent_symbols(latent_shape)) if self.mode == "equal_energy" else None


def make_simulator(
    pipe: StableDiffusion,
    codec: SeedCodec | Coder | None = None,
    scheme: str | Scheme = "seed",
    fading: str | Fading = "rayleigh",
    policy: str | Policy = "codec",
    config: SystemConfig = SystemConfig(),
    *,
    fitted: Any = None,
    weights: BlockWeights | Sequence[float] = WEIGHT_GRID_DB,
) -> Simulator:
    """The whole of mobile edge generation under one scheme: `simulator(key, simulator.params, ids, snr_db)`.

    Args:
      pipe: the diffusion model of server and device.
      codec: what makes the seed, a `SeedCodec` or any `megjax.codec.coders.Coder`; the statistics of a `SeedCodec` also
        serve the other schemes.
      scheme: a name of `megjax.system.SCHEMES`, with options as in "seed:rate=2", or an object, as `Seed(rate=2)`.
      fading: law of the gains, a name such as "rician:6" or anything with `sample(key, num_blocks)`.
      policy: a name of `megjax.power.POLICIES` or an object with `allocate`; "codec" is the load that the code asks
        for.
      config: everything else.
      fitted: what the scheme's `fit` would make, such as the table of `fit_image_codec`.
      weights: importance of the blocks, or the effective SNRs in dB at which it is measured on the codec's validation
        latents; only where a policy asks for them.

    Raises:
      ValueError: an unknown name, parts that do not fit each other, or a number out of range.
    """
    require(isinstance(pipe, StableDiffusion), "pipe", type(pipe).__name__, "a StableDiffusion")
    require(not isinstance(codec, StableDiffusion), "codec", type(codec).__name__, "a SeedCodec, a Coder or None")
    scheme = find_scheme(scheme)
    fading = find_fading(fading) if isinstance(fading, str) else fading
    require(callable(getattr(fading, "sample", None)), "fading", fading, "a name or an object with a method sample")
    parts = Parts(
        pipe,
        codec,
        config.statistics,
        pipe.sampler(config.sampler, config.num_steps),
        fading,
        config.num_blocks,
        config.energy(pipe.latent_shape()),
    )
    if parts.learned is not None:
        fits = parts.learned.latent_shape == parts.latent_shape
        require(fits, "codec's latent shape", parts.learned.latent_shape, f"the model's, {parts.latent_shape}")
    link, parameters = scheme.build(parts, scheme.fit(parts) if fitted is None else fitted)
    agreed = link.result == scheme.result
    require(agreed, f"result of the link of {scheme.name!r}", link.result, f"its scheme's, {scheme.result!r}")
    found = _policy(policy, fading, config)
    if not isinstance(weights, BlockWeights):
        asked = scheme.sends_seed and found is not None and not isinstance(found, EqualPower)
        weights = measured_weights(parts.learned, link, weights) if asked else None
    params = {
        **pipe.params,
        "codec": as_pytree(parameters),
        "fading": as_pytree(fading),
        "policy": as_pytree(found),
        "weights": weights,
        "negative_ids": np.asarray(pipe.tokenize([""])) if config.guided else None,
    }
    return Simulator(
        params=params,
        graphs=pipe.graphs,
        link=link,
        sampler=parts.sampler,
        scheduler=pipe.configs.scheduler,
        latent_shape=parts.latent_shape,
        guided=config.guided,
        server_steps=getattr(scheme, "server_steps", None),
        device_steps=getattr(scheme, "device_steps", 0),
        device_sampler=getattr(scheme, "device_sampler", "ddim"),
        energy=parts.energy,
        peak_power=float(config.peak_power),
        decode_batch=config.decode_batch,
    )


def _policy(policy: str | Policy, fading: Fading, config: SystemConfig) -> Policy | None:
    """The policy of a name, or a user's own after a check; None for the code's own load."""
    if isinstance(policy, str):
        return make_policy(policy, fading, config.num_blocks)
    ready = callable(getattr(policy, "allocate", None))
    require(ready, "policy", policy, "a name or an object with a method allocate")
    check_policy(policy, fading, config.num_blocks, config.peak_power)
    return policy


def measured_weights(codec: SeedCodec | None, link: Link, snr_db: Sequence[float] = WEIGHT_GRID_DB) -> BlockWeights:
    """Importance of a seed's blocks at these effective SNRs, by its link's mapping; equal if the codec cannot say."""
    levels = tuple(float(level) for level in snr_db)
    if codec is None or codec.validation is None:
        return BlockWeights(jnp.asarray(levels, jnp.float32), jnp.ones((len(levels), link.num_blocks), jnp.float32))
    rows = [codec.block_weights(link.num_symbols, level, link.num_blocks, link.mapping) for level in levels]
    return BlockWeights(jnp.asarray(levels, jnp.float32), jnp.stack(rows))


def simulate(
    key: Key[Array, ""] | UInt32[Array, "2"] | int,
    pipe: StableDiffusion,
    codec: SeedCodec | Coder | None,
    prompts: Sequence[str],
    scheme: str | Scheme = "seed",
    fading: str | Fading = "rayleigh",
    snr_db: float = 0.0,
    policy: str | Policy = "codec",
    config: SystemConfig = SystemConfig(),
    *,
    realisations: int = 1,
    guidance_scale: float = 3.0,
) -> Transmission:
    """Prompts to received images in one call, compiled as one program; arguments as those of `make_simulator`.

    `guidance_scale` says whether denoising is guided, whatever `config` has. A second call with the same shapes and
    settings does not compile again. `key` may be a seed. Raises ValueError as
    `make_simulator`, and for an SNR that is not a number or no prompts.
    """
    require(check_snr_db(snr_db).ndim == 0, "snr_db", snr_db, "one number in dB")
    key, realisations = as_key(key), require_count("realisations", realisations)
    guidance_scale = require_number("guidance_scale", guidance_scale)
    config = dataclasses.replace(config, guided=guidance_scale > 1)
    made = make_simulator(pipe, codec, scheme, fading, policy, config)
    ids = pipe.tokenize(prompts)
    return simulators.run(made, key, made.params, ids, jnp.float32(snr_db), jnp.float32(guidance_scale), realisations)
