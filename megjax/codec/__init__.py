"""The seed codec: a latent squeezed into few channel symbols, its classical rivals and its limit."""

from megjax.codec.network import SeedCodecConfig, SeedNetwork
from megjax.codec.seed import SeedCodec

__all__ = ["SeedCodec", "SeedCodecConfig", "SeedNetwork"]
