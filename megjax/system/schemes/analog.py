"""Schemes that send values of an analog coder as they are: the seed, the raw latent and raw pixels."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from megjax.channel import MAPPINGS, symbols_per_block
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import SeedCodec, link
from megjax.codec.coders import KLTCoder, LearnedCoder, RawCoder
from megjax.configs import require
from megjax.system.protocol import Code, Link, Source, mean_power
from megjax.system.schemes.base import SCHEMES, Parts, Scheme, codec_statistics, latent_symbols
from megjax.units import linear_to_db

CONTENTS = ("latents", "images")


@dataclasses.dataclass(frozen=True)
class AnalogLink:
    """Values of an analog coder as they are: the latent's, the seed's or the pixels'; the parameters are the coder.

    The coder is a `megjax.codec.coders.Coder`. `content` is what it codes, "latents" or "images".
    """

    num_symbols: int
    num_blocks: int = 16
    mapping: str = "ordered"
    content: str = "latents"
    on_host: ClassVar[bool] = False

    def __post_init__(self):
        require(self.mapping in MAPPINGS, "mapping", self.mapping, f"one of {MAPPINGS}")
        require(self.content in CONTENTS, "content", self.content, f"one of {CONTENTS}")
        symbols_per_block(self.num_symbols, self.num_blocks)

    @property
    def result(self) -> str:
        """What is coded."""
        return self.content

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Values of every image, and what load and shape they are sent with."""
        power = mean_power(self.num_symbols, energy)
        level = jnp.asarray(snr_db, jnp.float32) + linear_to_db(power)
        spending = params.spending(level, self.num_symbols, self.num_blocks, self.mapping)
        values = params.encode(getattr(source, self.content), level, self.num_symbols)
        return Code(values, (spending, level), jnp.float32(self.num_symbols), power, spending.load)

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> link.Received:
        """LMMSE estimates of one image's values and their SNRs."""
        return link.send_code(key, payload, shared[0], gains, power, noise_var, self.num_symbols, self.mapping)

    def decode(self, params: Any, received: link.Received, shared: PyTree) -> Float[Array, "n h w c"]:
        """Latents, or images cut to [0, 1]."""
        decoded = params.decode(received, shared[1], self.num_symbols)
        return jnp.clip(decoded, 0.0, 1.0) if self.content == "images" else decoded


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class Seed(Scheme):
    """The seed of the learned codec, or of a user's own coder."""

    name: ClassVar[str] = "seed"
    title: ClassVar[str] = "seed"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 10
    needs_codec: ClassVar[bool] = True
    sends_seed: ClassVar[bool] = True

    rate: float = 4.0
    """Compression ratio r."""
    mapping: str = "ordered"
    """How symbols go to blocks: most important first, or "interleaved"."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = hwc / (2r)."""
        return link.symbols_at_rate(self.rate, int(np.prod(latent_shape)))

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """An analog link and the coder."""
        count = self.num_symbols(parts.image_shape, parts.latent_shape)
        link.check_symbols(count, int(np.prod(parts.latent_shape)), parts.num_blocks)
        return AnalogLink(count, parts.num_blocks, self.mapping), self.coder(parts)

    def coder(self, parts: Parts) -> Any:
        """A `megjax.codec.coders.Coder`."""
        require(parts.codec is not None, "codec", None, f"given for scheme {self.name!r}")
        if parts.learned is not None:
            return LearnedCoder(parts.learned.graph, parts.learned.state)
        ready = all(callable(getattr(parts.codec, name, None)) for name in ("spending", "encode", "decode"))
        require(ready, "codec", parts.codec, "a SeedCodec or an object with methods spending, encode and decode")
        return parts.codec


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class SeedKLT(Seed):
    """The seed by the Karhunen-Loeve transform of the codec's training latents, the best linear code."""

    name: ClassVar[str] = "seed-klt"
    title: ClassVar[str] = "KLT"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 20

    def coder(self, parts: Parts) -> KLTCoder:
        """The transform, with loads that are best under the law, or under Rayleigh fading if it has no mean error."""
        statistics = codec_statistics(parts.require_learned(self.name))
        mean_error = getattr(parts.fading, "mean_lmmse_error", mean_lmmse_error_rayleigh)
        return KLTCoder(statistics, parts.latent_shape, mean_error)


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class Latent(Scheme):
    """The raw latent, received symbol by symbol."""

    name: ClassVar[str] = "latent"
    title: ClassVar[str] = "latent"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 40

    mapping: str = "interleaved"
    """How symbols go to blocks: dealt out in turn, or "ordered"."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = hwc / 2."""
        return latent_symbols(latent_shape)

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """An analog link and a `megjax.codec.coders.RawCoder`."""
        count = self.num_symbols(parts.image_shape, parts.latent_shape)
        link.check_symbols(count, int(np.prod(parts.latent_shape)), parts.num_blocks)
        mean, std = (jnp.asarray(x) for x in parts.latent_moments())
        coder = RawCoder(mean, std, parts.latent_shape, self.statistics(parts))
        return AnalogLink(count, parts.num_blocks, self.mapping), coder

    def statistics(self, parts: Parts) -> Any:
        """Statistics that the receiver filters by, if any."""
        del parts


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class LatentWiener(Latent):
    """The raw latent, received by the full-covariance Wiener filter."""

    name: ClassVar[str] = "latent-wiener"
    title: ClassVar[str] = "latent, Wiener receiver"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 50
    needs_codec: ClassVar[bool] = True
    factorises: ClassVar[bool] = True

    def statistics(self, parts: Parts) -> Any:
        """Covariance of the codec's training latents."""
        return codec_statistics(parts.require_learned(self.name))


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class LatentDenoiser(Latent):
    """The raw latent, received by a learned denoiser: a codec with transform "raw" that is trained for it."""

    name: ClassVar[str] = "latent-denoiser"
    title: ClassVar[str] = "latent, learned receiver"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 55

    folder: str = "runs/codec-scenes/denoiser/model"
    """Folder of the codec, as `python -m train.codec --variant denoiser` writes it."""

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """An analog link and the codec as coder."""
        denoiser, shape = self._denoiser(), parts.latent_shape
        require(
            denoiser.latent_shape == shape, "denoiser's latent shape", denoiser.latent_shape, f"the model's, {shape}"
        )
        count = self.num_symbols(parts.image_shape, shape)
        link.check_symbols(count, int(np.prod(shape)), parts.num_blocks)
        return AnalogLink(count, parts.num_blocks, self.mapping), LearnedCoder(denoiser.graph, denoiser.state)

    def weights(self) -> Any:
        """Configuration and weights of the codec."""
        denoiser = self._denoiser()
        return repr(denoiser.config), denoiser.state

    def _denoiser(self) -> SeedCodec:
        name, made = f"folder of {self.name}", "one that `python -m train.codec --variant denoiser` wrote"
        require(Path(self.folder).is_dir(), name, self.folder, made)
        codec = SeedCodec.from_pretrained(self.folder)
        require(codec.config.transform == "raw", name, self.folder, made)
        return codec


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class Centralized(Scheme):
    """Finished pixels, analog."""

    name: ClassVar[str] = "centralized"
    title: ClassVar[str] = "centralized, analog"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 60
    result: ClassVar[str] = "images"

    mapping: str = "interleaved"
    """How symbols go to blocks: dealt out in turn, or "ordered"."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int:
        """K = 3HW / 2."""
        return -(-int(np.prod(image_shape)) // 2)

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """An analog link and a `megjax.codec.coders.RawCoder` of the pixels."""
        moments = parts.statistics.pixel_mean, parts.statistics.pixel_std
        coder = RawCoder(*(jnp.asarray(x, jnp.float32) for x in moments), parts.image_shape)
        count = self.num_symbols(parts.image_shape, parts.latent_shape)
        return AnalogLink(count, parts.num_blocks, self.mapping, "images"), coder
