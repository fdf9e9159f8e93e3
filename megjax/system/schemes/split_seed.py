"""Split inference with a seed: the device hides what seed decoding leaves under noise, and removes both."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree
from scipy.optimize import nnls

from megjax.channel import Fading, post_equalisation_snr
from megjax.codec.coders import Coder
from megjax.configs import require, require_count
from megjax.keys import from_seed, threefry
from megjax.pytrees import as_pytree, value_of
from megjax.system.protocol import Code, Link, Noisy, Source
from megjax.system.realise import realisation_keys, realise
from megjax.system.schemes.analog import AnalogLink, Seed
from megjax.system.schemes.base import SCHEMES, WEIGHT_GRID_DB, Parts
from megjax.units import db_to_linear

ERROR_DRAWS = 4
"""Realisations of the link for each latent that a `SeedErrors` is fitted on."""


class SeedErrors(NamedTuple):
    """Mean squared error of a latent's values after seed decoding, as the device predicts it from its blocks' SNRs.

    At effective SNRs `snr_db` [g] it is constant + sum_t slopes_t / (1 + gamma_t), linear between them.
    """

    snr_db: Float[Array, " g"]
    coefficients: Float[Array, "g t1"]
    """The constant and T slopes."""

    def at(self, snr_db: Float[ArrayLike, ""], block_snr: Float[Array, " t"]) -> Float[Array, ""]:
        """The error of one reception, for the SNRs gamma_t [t] of its blocks after equalisation."""
        found = jax.vmap(lambda column: jnp.interp(snr_db, self.snr_db, column), in_axes=1)(self.coefficients)
        return found[0] + jnp.sum(found[1:] / (1 + block_snr))


def fit_seed_errors(
    key: Key[Array, ""],
    coder: Coder,
    link: AnalogLink,
    latents: Float[Array | np.ndarray, "n h w c"],
    fading: Fading,
    snr_db: tuple[float, ...],
) -> SeedErrors:
    """Least squares with coefficients of at least zero, over these latents and draws of the gains, block load as coded.

    `snr_db` are effective SNRs, rising. The additive model is that of the block weights: a lost block costs what it
    costs whatever becomes of the others.
    """
    numbers = np.arange(len(latents), dtype=np.uint32)

    @jax.jit
    def measure(coder, latents, level, draw):
        coder = value_of(coder)
        code = link.code(coder, Source(latents, None, latents), level, None)
        keys, noise_var = realisation_keys(key, numbers, draw), 1 / db_to_linear(level)

        def one(key, payload):
            made = realise(link, coder, key, code._replace(payload=payload), fading, noise_var, lambda gains: code.load)
            return made.received, post_equalisation_snr(made.gains, made.power, noise_var)

        received, block_snr = jax.vmap(one)(keys, code.payload)
        error = jnp.square(link.decode(coder, received, code.shared) - latents).mean((1, 2, 3))
        return 1 / (1 + block_snr), error

    rows = []
    for level in snr_db:
        parts = [measure(as_pytree(coder), latents, jnp.float32(level), draw) for draw in range(ERROR_DRAWS)]
        lost, error = (np.concatenate([np.asarray(p[i], np.float64) for p in parts]) for i in (0, 1))
        rows.append(nnls(np.column_stack([np.ones(len(lost)), lost]), error)[0])
    return SeedErrors(jnp.asarray(snr_db, jnp.float32), jnp.asarray(np.stack(rows), jnp.float32))


class SeedSplit(NamedTuple):
    """The parameters of a `SeedSplitLink`."""

    codec: Any
    """A `megjax.codec.coders.Coder`."""
    errors: SeedErrors


@dataclasses.dataclass(frozen=True)
class SeedSplitLink:
    """A seed whose decoded latent is noised again and then denoised by the device.

    What seed decoding leaves is no white noise: weak components are missing. So the device hides it: it predicts the
    mean squared error e of its latent z^ from the blocks' SNRs, draws w ~ N(0, I) and starts `device_steps` steps at

      x = sqrt(alpha-bar) (z^ + sqrt(s) w), alpha-bar = 1 / (1 + s), s = `renoise` e,

    as C. Meng et al., "SDEdit", 2022, sec. 3.2, with the level that fits the error.
    """

    analog: AnalogLink
    latent_shape: tuple[int, int, int]
    device_steps: int = 5
    renoise: float = 2.0
    result: ClassVar[str] = "noisy"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        require_count("device_steps", self.device_steps)
        require(0 < self.renoise < np.inf, "renoise", self.renoise, "positive and finite")

    @property
    def num_symbols(self) -> int:
        """K = hwc / (2r)."""
        return self.analog.num_symbols

    @property
    def num_blocks(self) -> int:
        """T."""
        return self.analog.num_blocks

    @property
    def mapping(self) -> str:
        """How symbols go to blocks."""
        return self.analog.mapping

    def code(self, params: SeedSplit, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """That of the seed."""
        return self.analog.code(value_of(params.codec), source, snr_db, energy)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> PyTree:
        """What the seed's receiver has, s, and w."""
        noise_key, channel_key = jax.random.split(threefry(key))
        noise = jax.random.normal(noise_key, self.latent_shape, jnp.float32)
        received = self.analog.transmit(value_of(params.codec), channel_key, payload, shared, gains, power, noise_var)
        error = params.errors.at(shared[1], post_equalisation_snr(gains, power, noise_var))
        return received, self.renoise * error, noise

    def decode(self, params: SeedSplit, received: PyTree, shared: PyTree) -> Noisy:
        """Seed decoding, then the noise."""
        code, added, noise = received
        latents = self.analog.decode(value_of(params.codec), code, shared)
        alpha_bar, wide = 1 / (1 + added), added[:, None, None, None]
        return Noisy((latents + jnp.sqrt(wide) * noise) / jnp.sqrt(1 + wide), alpha_bar)


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class SplitSeed(Seed):
    """The seed, whose decoded latent the device noises and denoises."""

    name: ClassVar[str] = "split-seed"
    title: ClassVar[str] = "split of the seed"
    version: ClassVar[int] = 2
    rank: ClassVar[int] = 100
    result: ClassVar[str] = "noisy"

    device_steps: int = 5
    """Denoising steps of the device."""
    device_sampler: str = "ddim"
    """Sampler of the device, one of `megjax.diffusion.samplers.SAMPLERS` that can start at any noise level."""

    def fit(self, parts: Parts) -> SeedErrors:
        """The seed's error over the SNRs, for this law, on the codec's validation latents."""
        link, coder = super().build(parts, None)
        latents = None if parts.learned is None else parts.learned.validation
        allowed = "a SeedCodec with validation latents, or give `fitted`"
        require(latents is not None, "codec", parts.codec, allowed)
        return fit_seed_errors(from_seed(0), coder, link, latents, parts.fading, WEIGHT_GRID_DB)

    def build(self, parts: Parts, fitted: SeedErrors) -> tuple[Link, Any]:
        """A `SeedSplitLink`, and the coder with the errors."""
        link, coder = super().build(parts, None)
        return SeedSplitLink(link, parts.latent_shape, self.device_steps), SeedSplit(as_pytree(coder), fitted)
