"""Laws of the block-fading gains h_t, all with E|h_t|^2 = 1."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Complex, Key

from megjax.channel.parameters import channel_model, check_count
from megjax.channel.random import complex_normal


@runtime_checkable
class Fading(Protocol):
    """Anything that draws the gains of one transmission."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Complex gains [t] of `num_blocks` consecutive blocks, one realisation; the caller vmaps over keys."""


@channel_model
class NoFading:
    """Additive white Gaussian noise only: every gain is 1."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of ones; `key` is unused."""
        check_count("num_blocks", num_blocks)
        return jnp.ones(num_blocks, jnp.complex64)


@channel_model
class RayleighFading:
    """Independent Rayleigh fading from block to block: h_t ~ CN(0, 1), so |h_t|^2 is exponential with mean 1."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent and circularly symmetric Gaussian."""
        check_count("num_blocks", num_blocks)
        return complex_normal(key, (num_blocks,))
