"""The Gaussian limit of the latent's error, as a scheme of sweeps: a bound, which no image comes out of."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from megjax.channel import post_equalisation_snr, symbols_per_block
from megjax.codec import link
from megjax.codec.opta import opta_nmse
from megjax.system.protocol import Code, Link, Source, mean_power
from megjax.system.schemes.base import SCHEMES, Parts, Scheme, codec_statistics


@dataclasses.dataclass(frozen=True)
class OPTALink:
    """The least squared error of a Gaussian latent for the gains of a realisation; the parameters are its variances."""

    num_symbols: int
    num_blocks: int = 16
    result: ClassVar[str] = "error"
    on_host: ClassVar[bool] = False

    def code(
        self, params: Float[Array, " n"], source: Source, snr_db: Float[ArrayLike, ""], energy: float | None
    ) -> Code:
        """No values: the limit does not depend on the latent."""
        payload = jnp.zeros((len(source.latents), 0), jnp.float32)
        load, count = jnp.ones(self.num_blocks, jnp.float32), jnp.float32(self.num_symbols)
        return Code(payload, (), count, mean_power(self.num_symbols, energy), load)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Float[Array, ""]:
        """Squared error of the limit, `megjax.codec.opta.opta_nmse` times the total variance."""
        counts = symbols_per_block(self.num_symbols, self.num_blocks)
        return opta_nmse(params, post_equalisation_snr(gains, power, noise_var), counts) * jnp.sum(params)

    def decode(self, params: Float[Array, " n"], received: Float[Array, " n"], shared: PyTree) -> Float[Array, " n"]:
        """The errors."""
        return received


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class OPTA(Scheme):
    """The Gaussian limit at equal power of the blocks."""

    name: ClassVar[str] = "opta"
    title: ClassVar[str] = "Gaussian limit"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 30
    result: ClassVar[str] = "error"
    needs_codec: ClassVar[bool] = True
    allocates: ClassVar[bool] = False

    rate: float = 4.0
    """Compression ratio of the seed that it bounds."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = hwc / (2r)."""
        return link.symbols_at_rate(self.rate, int(np.prod(latent_shape)))

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """An `OPTALink` and the variances of the codec's training latents."""
        variances = codec_statistics(parts.require_learned(self.name)).variances
        return OPTALink(self.num_symbols(parts.image_shape, parts.latent_shape), parts.num_blocks), variances
