"""What an analog coder of latents is: values of unit variance, the power that they are worth, and their decoding.

SNRs are effective, P / sigma^2 in dB: the link is simulated at P = 1, which is the same physics. Latents come in
batches; K is static.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, ArrayLike, Float

from megjax.channel import MAPPINGS
from megjax.codec import link
from megjax.configs import require


@runtime_checkable
class Coder(Protocol):
    """What an analog coder is: a pytree, so that it can be an argument of a jitted function."""

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """Load of the blocks and shape [n] inside them, which depend on these arguments only."""

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """Values of zero mean and unit variance over the data, of which the first 2K are sent."""

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """Latents from what the receivers have, `estimate` [b n] and `snr` [b n]."""


def spending_of(spend: Float[Array, " n"], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
    """Load and shape of a power for each value; ValueError for an unknown mapping or a K that does not fit."""
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    link.check_symbols(num_symbols, spend.shape[0], num_blocks)
    return link.spending(spend, num_symbols, num_blocks, mapping)
