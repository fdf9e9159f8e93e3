"""The Karhunen-Loeve transform with optimal loads, the best linear coder."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from megjax.channel.loading import MeanError
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import linear, link
from megjax.codec.coders.base import spending_of
from megjax.codec.linear import LatentStatistics
from megjax.pytrees import pytree_dataclass, static
from megjax.units import db_to_linear


@pytree_dataclass
class KLTCoder:
    """The KLT with the loads of every value that are best for a fading law, given by its `mean_error`."""

    statistics: LatentStatistics
    latent_shape: tuple[int, int, int] = static()
    mean_error: MeanError = static(default=mean_lmmse_error_rayleigh)

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """`klt_load` of the first 2K values."""
        size = self.statistics.mean.shape[0]
        link.check_symbols(num_symbols, size, num_blocks)
        load = linear.klt_load(self.statistics, 2 * num_symbols, db_to_linear(snr_db), self.mean_error)
        return spending_of(jnp.pad(load, (0, size - 2 * num_symbols)), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Coder`; the values depend on neither SNR nor K."""
        del snr_db, num_symbols
        return jax.vmap(linear.klt_encode, (None, 0))(self.statistics, latents)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """the linear optimum."""
        del snr_db, num_symbols
        return jax.vmap(lambda r: linear.klt_decode(self.statistics, *r, self.latent_shape))(received)
