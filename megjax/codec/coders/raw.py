"""The raw latent, or any array of this kind, sent as it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from megjax.codec import linear, link
from megjax.codec.coders.base import spending_of
from megjax.codec.linear import LatentStatistics
from megjax.pytrees import pytree_dataclass, static


@pytree_dataclass
class RawCoder:
    """The raw latent in its natural order at equal power, standardised per channel.

    With `statistics` the receiver is the full-covariance Wiener filter, without them it takes symbol by symbol.
    """

    mean: Float[Array, " c"]
    std: Float[Array, " c"]
    latent_shape: tuple[int, int, int] = static()
    statistics: LatentStatistics | None = None

    @classmethod
    def of(cls, latents: Float[ArrayLike, "n h w c"], statistics: LatentStatistics | None = None) -> "RawCoder":
        """The scheme with the channels' means and standard deviations over these latents."""
        latents = jnp.asarray(latents, jnp.float32)
        return cls(latents.mean((0, 1, 2)), latents.std((0, 1, 2)), latents.shape[1:], statistics)

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """the same power for all values."""
        del snr_db
        height, width, channels = self.latent_shape
        return spending_of(jnp.ones(height * width * channels, jnp.float32), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Coder`; the values depend on neither SNR nor K."""
        del snr_db, num_symbols
        return jax.vmap(lambda z: linear.raw_encode(self.mean, self.std, z))(latents)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """As in `Coder`."""
        del snr_db, num_symbols
        if self.statistics is None:
            return jax.vmap(lambda r: linear.raw_decode(self.mean, self.std, *r, self.latent_shape))(received)
        return jax.vmap(lambda r: linear.wiener_decode(self.statistics, self.mean, self.std, *r, self.latent_shape))(
            received
        )
