"""What a scheme is, what it is built from, and the table of the schemes that can be asked for by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_type_hints

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from megjax.channel import Fading
from megjax.codec import SeedCodec, SeedNetwork
from megjax.codec.coders import Coder
from megjax.codec.linear import LatentStatistics
from megjax.configs import require
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import Sampler
from megjax.keys import from_seed
from megjax.registry import Registry
from megjax.system.protocol import Link
from megjax.system.source import SourceStatistics

NUM_BLOCKS = 16
"""Fading blocks per image, T, unless said otherwise."""
WEIGHT_GRID_DB = tuple(np.arange(-15.0, 36.0, 5.0).tolist())
"""Effective SNRs at which the importance of blocks and the errors of a seed are measured by default."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the links of schemes are built from: models, the law of the gains, and data to fit constants on."""

    pipe: StableDiffusion
    codec: SeedCodec | Coder | None
    statistics: SourceStatistics
    sampler: Sampler
    """Tables of the server's sampling."""
    fading: Fading
    num_blocks: int = NUM_BLOCKS
    energy: float | None = None
    """Energy per image in units of one symbol at power 1; None for mean power 1."""
    snr_db: tuple[float, ...] = ()
    """SNRs, 1 / sigma^2, at which the scheme will be asked to work, where that is known."""
    key: Key[Array, ""] = dataclasses.field(default_factory=lambda: from_seed(0))
    """Key of what `Scheme.fit` draws."""
    training_images: Callable[[], Float[np.ndarray, "n H W 3"]] | None = None
    """Pictures like those that will be sent, for choices that are made on data; None where there are none."""
    training_latents: Callable[[], Float[np.ndarray, "n h w c"]] | None = None
    """Generated latents like those that will be sent; None where there are none."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [h w c] of a latent."""
        return self.pipe.latent_shape()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape [H W 3] of an image."""
        return (*self.pipe.image_size, 3)

    @property
    def learned(self) -> SeedCodec | None:
        """The codec, if it is a `SeedCodec`."""
        return self.codec if isinstance(self.codec, SeedCodec) else None

    def require_learned(self, scheme: str) -> SeedCodec:
        """The `SeedCodec`; ValueError naming the scheme that needs it if there is none."""
        require(self.learned is not None, "codec", self.codec, f"a SeedCodec for scheme {scheme!r}")
        return self.learned

    def latent_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation by channel of the latents; ValueError for statistics of other channels."""
        channels, given = self.latent_shape[2], self.statistics.latent_mean
        fits = self.learned is not None or len(given) == channels
        require(fits, "statistics: latent_mean", given, f"of {channels} channels")
        return latent_moments(self.learned, self.statistics)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to bring images to devices; its fields are its options, and those that a sweep varies are its axes.

    A subclass with `SCHEMES.register` as decorator is a scheme by name. To be asked for with options, it is given as
    an object, or as text such as "seed:rate=2,mapping=interleaved".
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """Short name for tables and plots."""
    version: ClassVar[int | None] = None
    """Number that is raised whenever the scheme's results change, or None; see `megjax.registry.Record`. A subclass
    does not inherit it."""
    rank: ClassVar[int] = 100
    result: ClassVar[str] = "latents"
    """One of `megjax.system.protocol.RESULTS`: what decoding gives."""
    needs_codec: ClassVar[bool] = False
    """Whether a trained codec is needed."""
    sends_seed: ClassVar[bool] = False
    """Whether the blocks differ in importance and the code asks for a load of its own."""
    transmits: ClassVar[bool] = True
    """Whether anything is sent, so that fading, SNR and power matter."""
    allocates: ClassVar[bool] = True
    """Whether the blocks' power is for a policy to set."""
    factorises: ClassVar[bool] = False
    """Whether the receiver factorises matrices."""

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> int | None:
        """Complex channel uses K of one image; None where each image has its own."""
        raise NotImplementedError

    def fit(self, parts: Parts) -> Any:
        """What `build` needs that takes long to make and depends on no single SNR: a pytree, or None."""
        del parts

    def weights(self) -> Any:
        """Trained weights that an option names: a pytree, which sweeps file results under too."""

    def build(self, parts: Parts, fitted: Any) -> tuple[Link, Any]:
        """The link and its parameters; `fitted` is what `fit` gave. ValueError for parts that do not fit."""
        raise NotImplementedError

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(field.name for field in dataclasses.fields(cls))


SCHEMES: Registry[type[Scheme]] = Registry("scheme", "megjax.system.schemes", "megjax.schemes")


def find_scheme(scheme: str | Scheme, setting: str = "scheme", defaults: Mapping[str, Any] | None = None) -> Scheme:
    """A scheme from its name, or from its name and options, as in "seed:rate=2,mapping=interleaved".

    Of the `defaults` it takes those that are its options and not given. ValueError naming the setting for an unknown
    name or option, or a value of another type.
    """
    if isinstance(scheme, Scheme):
        return scheme
    require(isinstance(scheme, str), setting, scheme, f"a Scheme or one of {', '.join(SCHEMES.names)}")
    name, colon, text = scheme.partition(":")
    kind = SCHEMES.find(name, setting)
    values = {option: value for option, value in (defaults or {}).items() if option in kind.options()}
    for item in text.split(",") if colon else ():
        option, _, value = item.partition("=")
        allowed = f"{name} with options of {', '.join(kind.options()) or 'none'}"
        require(option in kind.options(), setting, scheme, allowed)
        values[option] = _parsed(value, get_type_hints(kind)[option], f"{setting} {name!r}: {option}")
    return kind(**values)


def _parsed(text: str, kind: Any, name: str) -> Any:
    """An option's value from its text."""
    kinds = {int: "an integer", float: "a number", int | None: "an integer"}
    if kind not in kinds:
        return text
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        require(False, name, text, kinds[kind])


def latent_symbols(latent_shape: tuple[int, ...]) -> int:
    """K of a raw latent, hwc / 2 rounded up; also the energy that "equal energy" gives every scheme."""
    return -(-int(np.prod(latent_shape)) // 2)


def codec_statistics(codec: SeedCodec) -> LatentStatistics:
    """Mean, variances and basis of the latents that a codec was trained on; ValueError if it keeps none of them all.

    A codec whose latent is cut into several tiles, or with transform "raw", has no statistics of whole latents.
    """
    config, network = codec.config, nnx.merge(codec.graph, codec.state)
    whole = config.num_tiles == 1 and config.transform == "klt"
    require(whole, "codec", f"{config.num_tiles} tiles, transform {config.transform!r}", "one tile, transform 'klt'")
    scale = network.scale[...]
    return LatentStatistics(network.latent_mean[...], scale * scale, network.basis[...])


def latent_moments(codec: SeedCodec | None, source: SourceStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel of generated latents; of encoded images where no codec knows better."""
    if codec is None:
        return np.asarray(source.latent_mean, np.float32), np.asarray(source.latent_std, np.float32)
    network: SeedNetwork = nnx.merge(codec.graph, codec.state)
    scale, channels = np.asarray(network.scale[...], np.float64), codec.latent_shape[2]
    basis = np.eye(len(scale)) if network.basis is None else np.asarray(network.basis[...], np.float64)
    variance = (np.square(basis) @ np.square(scale)).reshape(-1, channels)
    mean = np.asarray(network.latent_mean[...], np.float64).reshape(-1, channels)
    std = np.sqrt(variance.mean(0) + mean.var(0))
    return mean.mean(0).astype(np.float32), std.astype(np.float32)
