"""Laws of the block-fading gains h_t, all with E|h_t|^2 = 1."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Key


@runtime_checkable
class Fading(Protocol):
    """Anything that draws the gains of one transmission."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Complex gains [t] of `num_blocks` consecutive blocks, one realisation; the caller vmaps over keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoFading:
    """Additive white Gaussian noise only: every gain is 1."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t] of ones; `key` is unused."""
        _check_num_blocks(num_blocks)
        return jnp.ones(num_blocks, jnp.complex64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RayleighFading:
    """Independent Rayleigh fading from block to block: h_t ~ CN(0, 1), so |h_t|^2 is exponential with mean 1."""

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t], independent and circularly symmetric Gaussian."""
        _check_num_blocks(num_blocks)
        return jax.random.normal(key, (num_blocks,), jnp.complex64)


def _check_num_blocks(num_blocks: int) -> None:
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; it must be 1 or more")
