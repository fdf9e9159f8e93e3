"""What a scheme is, what it is built from, and the table of the schemes that can be asked for by name."""

import dataclasses
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

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
from megjax.system.protocol import RESULTS, Link
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


def _check(scheme: type[Scheme]) -> None:
    """ValueError for a class that is no scheme."""
    known = isinstance(scheme, type) and issubclass(scheme, Scheme)
    require(known, "scheme", scheme, "a class that extends megjax.system.Scheme")
    # Without the decorator its own fields are no options.
    decorated = "__dataclass_params__" in vars(scheme)
    require(decorated, "scheme", scheme.__name__, "a frozen dataclass before it is registered")
    require(scheme.result in RESULTS, f"result of scheme {scheme.name!r}", scheme.result, f"one of {RESULTS}")


SCHEMES: Registry[type[Scheme]] = Registry("scheme", "megjax.system.schemes", "megjax.schemes", _check)


def find_scheme(scheme: str | Scheme, setting: str = "scheme", defaults: Mapping[str, Any] | None = None) -> Scheme:
    """A scheme from its name, or from its name and options, as in "seed:rate=2,mapping=interleaved".

    Of the `defaults` it takes those that are its options and not given. ValueError naming the setting for an unknown
    name or option, an option that is given twice or not at all though it has no default, or a value of another type.
    """
    if isinstance(scheme, Scheme):
        return scheme
    kind, given = split_name(scheme, setting)
    values = {option: value for option, value in (defaults or {}).items() if option in kind.options()}
    hints = get_type_hints(kind)
    for option, text in given.items():
        values[option] = _parsed(text, hints[option], f"{setting} {kind.name!r}: {option}")
    needed = (field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
    absent = ", ".join(option for option in needed if option not in values)
    require(not absent, setting, scheme, f"given with options, as in {kind.name}:OPTION=VALUE; missing: {absent}")
    return kind(**values)


def split_name(scheme: str, setting: str = "scheme") -> tuple[type[Scheme], dict[str, str]]:
    """The class of a scheme's name, and the options that follow it as text; ValueError as `find_scheme`."""
    require(isinstance(scheme, str), setting, scheme, f"a Scheme or one of {', '.join(SCHEMES.names)}")
    name, colon, text = scheme.partition(":")
    kind, given = SCHEMES.find(name, setting), {}
    for item in text.split(",") if colon else ():
        option, equals, value = item.partition("=")
        allowed = f"{name} with options of {', '.join(kind.options()) or 'none'}, each once, as OPTION=VALUE"
        require(option in kind.options() and bool(equals) and option not in given, setting, scheme, allowed)
        given[option] = value
    return kind, given


def _parsed(text: str, hint: Any, name: str) -> Any:
    """An option's value from its text, of a scalar type or a `Literal`, or None where that is allowed."""
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    (kind, *more) = (kind for kind in kinds if kind is not type(None))
    readable = not more and (kind in _READERS or get_origin(kind) is Literal)
    require(readable, f"type of {name}", hint, "bool, int, float, str or a Literal of texts to be given in a name")
    if get_origin(kind) is Literal:
        require(text in get_args(kind), name, text, f"one of {get_args(kind)}")
        return text
    read, what = _READERS[kind]
    try:
        return read(text)
    except (KeyError, ValueError):
        require(False, name, text, what)


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a text"),
}
"""How options are read from text, by type, and what a text must be."""


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
