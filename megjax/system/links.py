"""What crosses the radio link in each scheme: seed coding at the server, transmission, decoding at the device.

A link is static; its parameters are a pytree that is handed to every method, so that they can be swept and
differentiated. The link is simulated at mean power 1 and noise variance sigma^2 / P, which is the same physics as mean
power P and sigma^2. SNRs called effective are P / sigma^2.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Complex, Float, Key, PyTree

from megjax.channel import (
    MAPPINGS,
    bits_per_symbol,
    demodulate,
    equalize_zf,
    modulate,
    pack,
    symbols_per_block,
    transmit,
    unpack,
)
from megjax.codec import link
from megjax.configs import require
from megjax.units import linear_to_db

RESULTS = ("latents", "images", "noisy")
"""What decoding gives: clean latents, finished images, or latents that the device has yet to denoise."""


class Source(NamedTuple):
    """What the server has made of a batch of prompts."""

    latents: Float[Array, "b h w c"]
    images: Float[Array, "b H W 3"] | None
    """None where only latents are asked for."""
    partial: Float[Array, "b h w c"]
    """Latents after the server's share of the denoising steps: `latents` unless the device finishes them."""


class Code(NamedTuple):
    """What is sent of a batch of images at one SNR, the same in every realisation."""

    payload: PyTree
    """Leaves [b ...], one entry for each image."""
    shared: PyTree
    """What transmitter and receiver know without being told: it depends on SNR and rate only."""
    num_symbols: Float[Array, "*b"]
    """K, of all images or of each."""
    mean_power: Float[Array, "*b"]
    """P, of all images or of each."""
    load: Float[Array, " t"]
    """Power of the blocks in units of P that the code itself asks for, mean 1."""


class Noisy(NamedTuple):
    """A variance-preserving latent and its noise level, which the device goes on denoising from."""

    latents: Float[Array, "n h w c"]
    alpha_bar: Float[Array, " n"]


@runtime_checkable
class Link(Protocol):
    """One scheme's way over the channel; hashable, its parameters are the first argument of the methods."""

    num_blocks: int
    result: ClassVar[str]

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Seed coding: what to send of every image at this 1 / sigma^2.

        `energy` is the energy per image in units of one symbol at power 1, so that P = energy / K; None for P = 1.
        """

    def transmit(
        self,
        params: Any,
        key: Key[Array, ""],
        payload: PyTree,
        shared: PyTree,
        gains: Complex[Array, " t"],
        power: Float[Array, " t"],
        noise_var: Float[Array, ""],
    ) -> PyTree:
        """What the receiver makes of one image over one realisation, at powers in units of P."""

    def decode(self, params: Any, received: PyTree, shared: PyTree) -> Any:
        """Latents [n h w c], images [n H W 3] or `Noisy`, as `result` says, of n received images."""


def mean_power(num_symbols: ArrayLike, energy: float | None) -> Float[Array, "*b"]:
    """P = energy / K, or 1 without a given energy."""
    count = jnp.asarray(num_symbols, jnp.float32)
    return jnp.ones_like(count) if energy is None else energy / count


@dataclasses.dataclass(frozen=True)
class AnalogLink:
    """Values of an analog codec as they are: the latent's, the seed's or the pixels'; the parameters are the codec.

    The codec is a `megjax.codec.schemes.Scheme`. `content` is what it codes, "latents" or "images".
    """

    num_symbols: int
    num_blocks: int = 16
    mapping: str = "ordered"
    content: str = "latents"

    def __post_init__(self):
        require(self.mapping in MAPPINGS, "mapping", self.mapping, f"one of {MAPPINGS}")
        require(self.content in RESULTS[:2], "content", self.content, f"one of {RESULTS[:2]}")
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def result(self) -> str:
        """As in `Link`."""
        return self.content

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """As in `Link`."""
        power = mean_power(self.num_symbols, energy)
        level = jnp.asarray(snr_db, jnp.float32) + linear_to_db(power)
        spending = params.spending(level, self.num_symbols, self.num_blocks, self.mapping)
        values = params.encode(getattr(source, self.content), level, self.num_symbols)
        return Code(values, (spending, level), jnp.float32(self.num_symbols), power, spending.load)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> link.Received:
        """As in `Link`."""
        return link.send_code(key, payload, shared[0], gains, power, noise_var, self.num_symbols, self.mapping)

    def decode(self, params: Any, received: link.Received, shared: PyTree) -> Float[Array, "n h w c"]:
        """As in `Link`."""
        decoded = params.decode(received, shared[1], self.num_symbols)
        return jnp.clip(decoded, 0.0, 1.0) if self.content == "images" else decoded


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

    def __post_init__(self):
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def num_symbols(self) -> int:
        """K: 8 bits of every value; the last symbol is filled up with zeros."""
        return -(-8 * int(np.prod(self.image_shape)) // bits_per_symbol(self.modulation))

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """As in `Link`; the payload are the bits."""
        length = self.num_symbols * bits_per_symbol(self.modulation)
        bits = jax.vmap(lambda image: _to_bits(image, length) ^ _scrambling(length))(source.images)
        power = mean_power(self.num_symbols, energy)
        return Code(bits, (), jnp.float32(self.num_symbols), power, jnp.ones(self.num_blocks))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Bool[Array, " n"]:
        """As in `Link`: hard decisions on zero-forced symbols."""
        symbols = to_blocks(modulate(payload, self.modulation), self.num_blocks)
        received = equalize_zf(transmit(key, symbols, gains, power, noise_var), gains, power)
        return demodulate(from_blocks(received, self.num_symbols), self.modulation)

    def decode(self, params: Any, received: Bool[Array, "n s"], shared: PyTree) -> Float[Array, "n H W 3"]:
        """As in `Link`."""
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


def to_blocks(symbols: Complex[Array, " k"], num_blocks: int) -> Complex[Array, "t n"]:
    """Symbols dealt out to the blocks in turn, as `channel.pack` does with the values of an interleaved mapping."""
    values = np.float32(np.sqrt(2)) * jnp.stack([symbols.real, symbols.imag], -1).reshape(-1)
    return pack(values, num_blocks, "interleaved")


def from_blocks(symbols: Complex[Array, "t n"], num_symbols: int) -> Complex[Array, " k"]:
    """The inverse of `to_blocks`."""
    values = unpack(symbols, 2 * num_symbols, "interleaved").reshape(-1, 2) / np.float32(np.sqrt(2))
    return jax.lax.complex(values[:, 0], values[:, 1])
