"""The seed as bits: quantised KLT coefficients, entropy-coded, over an ideal channel code, with outage."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from megjax.channel import post_equalisation_snr, symbols_per_block
from megjax.codec import link
from megjax.codec.digital import DigitalSeed, choose_step, fit_digital, quantise
from megjax.codec.linear import LatentStatistics
from megjax.codec.opta import link_bits
from megjax.configs import require
from megjax.numerics import squared_magnitude
from megjax.system.protocol import Code, Link, Source, mean_power
from megjax.system.schemes.analog import Seed
from megjax.system.schemes.base import SCHEMES, Parts, codec_statistics
from megjax.units import db_to_linear

LAW_DRAWS = 20_000
"""Realisations that stand for the law of the gains when the transmitter chooses its quantiser."""


class DigitalParams(NamedTuple):
    """Parameters of a `DigitalLink`."""

    tables: DigitalSeed
    statistics: LatentStatistics
    law: Float[Array, "r t"]
    """Power gains of the blocks, drawn from the law that the transmitter knows."""


@dataclasses.dataclass(frozen=True)
class DigitalLink:
    """The digital seed of `megjax.codec.digital`: its step is the best on average, and its bits arrive all or none.

    A realisation carries sum_t k_t log2(1 + gamma_t) bits. Where these are fewer than the step's, the receiver has the
    mean latent.
    """

    num_symbols: int
    latent_shape: tuple[int, int, int]
    num_blocks: int = 16
    result: ClassVar[str] = "latents"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        symbols_per_block(self.num_symbols, self.num_blocks)

    def code(self, params: DigitalParams, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Latents as quantised, and the bits of the step that is best at equal power."""
        power = mean_power(self.num_symbols, energy)
        snr = power * db_to_linear(jnp.asarray(snr_db, jnp.float32))
        index = choose_step(params.tables, jax.vmap(self._bits)(snr * params.law))
        quantised = jax.vmap(lambda z: quantise(params.tables, params.statistics, z, index))(source.latents)
        load = jnp.ones(self.num_blocks, jnp.float32)
        return Code(quantised, params.tables.bits[index], jnp.float32(self.num_symbols), power, load)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Float[Array, "h w c"]:
        """The quantised latent, or the mean one in outage; `key` is unused, as noise is in the capacity."""
        arrives = self._bits(post_equalisation_snr(gains, power, noise_var)) >= shared
        return jnp.where(arrives, payload, params.statistics.mean.reshape(self.latent_shape))

    def decode(self, params: DigitalParams, received: Float[Array, "n h w c"], shared: PyTree) -> PyTree:
        """The same latents."""
        return received

    def _bits(self, snr: Float[Array, " t"]) -> Float[Array, ""]:
        return link_bits(snr, symbols_per_block(self.num_symbols, self.num_blocks))


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class SeedDigital(Seed):
    """The digital seed: KLT coefficients quantised and entropy-coded, over an ideal channel code."""

    name: ClassVar[str] = "seed-digital"
    title: ClassVar[str] = "digital seed, ideal code"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 25
    sends_seed: ClassVar[bool] = False

    def fit(self, parts: Parts) -> DigitalParams:
        """Tables of the quantisers on training latents, and draws of the law."""
        codec = parts.require_learned(self.name)
        latents = codec.validation if parts.training_latents is None else parts.training_latents()
        require(latents is not None, "codec", parts.codec, "a SeedCodec with validation latents, or give `fitted`")
        statistics = codec_statistics(codec)
        keys = jax.random.split(parts.key, LAW_DRAWS)
        sample = jax.jit(jax.vmap(lambda key: squared_magnitude(parts.fading.sample(key, parts.num_blocks))))
        gains = sample(jax.vmap(lambda key: jax.random.split(key)[0])(keys))
        return DigitalParams(fit_digital(statistics, np.asarray(latents)), statistics, gains)

    def build(self, parts: Parts, fitted: DigitalParams) -> tuple[Link, Any]:
        """A `DigitalLink` and its tables."""
        count = self.num_symbols(parts.image_shape, parts.latent_shape)
        link.check_symbols(count, int(np.prod(parts.latent_shape)), parts.num_blocks)
        return DigitalLink(count, parts.latent_shape, parts.num_blocks), fitted
