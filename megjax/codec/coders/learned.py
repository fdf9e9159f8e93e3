"""The learned codec as a coder."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from megjax.codec import link
from megjax.codec.coders.base import spending_of
from megjax.codec.network import SeedNetwork
from megjax.pytrees import pytree_dataclass, static


@pytree_dataclass
class LearnedCoder:
    """The learned codec, as `LearnedCoder(codec.graph, codec.state)` of a `SeedCodec`.

    With transform "raw" it is the raw latent with a learned receiver.
    """

    graph: nnx.GraphDef = static()
    state: nnx.State

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """the codec's own."""
        return spending_of(self._network().spend(snr_db, num_symbols), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Coder`."""
        return self._network().encode(latents, snr_db, num_symbols)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """As in `Coder`."""
        size = len(received.estimate)
        levels = jnp.full(size, snr_db, jnp.float32), jnp.full(size, num_symbols)
        return self._network().decode(received.estimate, received.snr, *levels)

    def _network(self) -> SeedNetwork:
        return nnx.merge(self.graph, self.state)
