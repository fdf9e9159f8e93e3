"""Finished pixels as uncoded QAM symbols."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from megjax.channel import bits_per_symbol, demodulate, equalize_zf, modulate, symbols_per_block, transmit
from megjax.channel.packing import from_blocks, to_blocks
from megjax.system.protocol import Code, Link, Source, mean_power
from megjax.system.schemes.base import SCHEMES, Parts, Scheme


@dataclasses.dataclass(frozen=True)
class QAMLink:
    """Finished pixels, 8 bits each, uncoded on Gray QAM; without parameters.

    The bits are scrambled by a fixed pseudo-random sequence, as pixels do not have equally likely bits and so would not
    give symbols of unit mean power.
    """

    image_shape: tuple[int, int, int]
    modulation: str = "16qam"
    num_blocks: int = 16
    result: ClassVar[str] = "images"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def num_symbols(self) -> int:
        """K: 8 bits of every value; the last symbol is filled up with zeros."""
        return -(-8 * int(np.prod(self.image_shape)) // bits_per_symbol(self.modulation))

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Bits of every image, scrambled."""
        length = self.num_symbols * bits_per_symbol(self.modulation)
        bits = jax.vmap(lambda image: _to_bits(image, length) ^ _scrambling(length))(source.images)
        power = mean_power(self.num_symbols, energy)
        return Code(bits, (), jnp.float32(self.num_symbols), power, jnp.ones(self.num_blocks))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Bool[Array, " n"]:
        """Hard decisions on zero-forced symbols."""
        symbols = to_blocks(modulate(payload, self.modulation), self.num_blocks)
        received = equalize_zf(transmit(key, symbols, gains, power, noise_var), gains, power)
        return demodulate(from_blocks(received, self.num_symbols), self.modulation)

    def decode(self, params: Any, received: Bool[Array, "n s"], shared: PyTree) -> Float[Array, "n H W 3"]:
        """Images from the bits."""
        return jax.vmap(lambda bits: _from_bits(bits ^ _scrambling(bits.shape[0]), self.image_shape))(received)


def _scrambling(length: int) -> Bool[np.ndarray, " s"]:
    return np.random.default_rng(0).random(length) < 0.5


def _to_bits(image: Float[Array, "H W 3"], length: int) -> Bool[Array, " s"]:
    """Most significant bits of all values first within each value, filled up with zeros."""
    levels = jnp.round(255 * image).astype(jnp.int32).reshape(-1)
    bits = (levels[:, None] >> jnp.arange(7, -1, -1)[None]) & 1
    return jnp.pad(bits.reshape(-1) == 1, (0, length - 8 * levels.size))


def _from_bits(bits: Bool[Array, " s"], shape: tuple[int, int, int]) -> Float[Array, "H W 3"]:
    values = jnp.where(
        bits[: 8 * int(np.prod(shape))].reshape(-1, 8), 2.0 ** jnp.arange(7, -1, -1, dtype=jnp.float32)[None], 0.0
    )
    return (values.sum(-1) / 255).reshape(shape)


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class CentralizedQAM(Scheme):
    """Finished pixels, 8 bits each, uncoded on QAM symbols."""

    name: ClassVar[str] = "centralized-qam"
    title: ClassVar[str] = "centralized, uncoded QAM"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 80
    result: ClassVar[str] = "images"

    modulation: str = "16qam"
    """One of `megjax.channel.MODULATIONS`."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K of the bits of all pixels."""
        return QAMLink(image_shape, self.modulation, 1).num_symbols

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """A `QAMLink`, without parameters."""
        return QAMLink(parts.image_shape, self.modulation, parts.num_blocks), ()
