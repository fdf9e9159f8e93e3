"""Simulators by name: schemes, their variants, fading laws and power policies put together and checked."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, UInt32

from megjax.channel import Fading, RayleighFading
from megjax.codec import SeedCodec, link
from megjax.codec.linear import LatentStatistics
from megjax.codec.network import SeedNetwork
from megjax.codec.schemes import KLTScheme, LearnedScheme, RawScheme, Scheme
from megjax.configs import require, require_count, require_number
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import as_key, from_seed
from megjax.power import EqualPower, Policy, check_policy, make_policy
from megjax.system import simulator as simulators
from megjax.system.image_codec import CodedImageLink, ImageCodecTable
from megjax.system.links import AnalogLink, Link, QAMLink
from megjax.system.simulator import BlockWeights, Simulator, Transmission
from megjax.system.source import SourceStatistics
from megjax.system.split import (
    PromptLink,
    SeedErrors,
    SeedSplit,
    SeedSplitLink,
    SplitConstants,
    SplitLink,
    fit_seed_errors,
)
from megjax.units import check_snr_db

NUM_BLOCKS = 16
"""Fading blocks per image, T, unless said otherwise."""
SCHEMES = {
    "centralized": ("analog", "qam", "coded"),
    "latent": ("symbol", "wiener"),
    "seed": ("learned", "klt"),
    "split": ("latent", "seed"),
    "prompt": ("device",),
}
"""Schemes and their variants, the default first."""
MODES = ("equal_power", "equal_energy")
"""P = 1, or P = K_latent / K, so that every scheme radiates the energy of the raw latent at P = 1."""
WEIGHT_GRID_DB = tuple(np.arange(-15.0, 36.0, 5.0).tolist())


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A user's object that is no pytree, as a leafless one: it has its attributes, and no parameters."""

    value: Any

    def __eq__(self, other):
        same = isinstance(other, Fixed) and self.value is other.value
        return same or (isinstance(other, Fixed) and _hashable(self.value) and self.value == other.value)

    def __hash__(self):
        return hash(self.value) if _hashable(self.value) else id(self.value)

    def __getattr__(self, name: str):
        return getattr(object.__getattribute__(self, "value"), name)


def _hashable(value: Any) -> bool:
    """Whether the value can be compared; a plain dataclass or one that holds arrays cannot, and is itself only."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def as_pytree(value: Any) -> Any:
    """`value` if JAX knows how to take it apart, else wrapped as `Fixed`."""
    leaves = jax.tree.leaves(value)
    return Fixed(value) if len(leaves) == 1 and leaves[0] is value else value


def num_symbols(
    scheme: str,
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    rate: float = 4.0,
    variant: str | None = None,
) -> int:
    """Complex channel uses K of one image.

    3HW/2 for analog pixels (`centralized`), hwc/2 for the raw `latent` and for `split`, hwc/(2r) for the `seed` at
    compression ratio `rate` and for `split` in its variant "seed", 0 for `prompt`. ValueError for another scheme or a
    rate that gives no symbol.
    """
    require(scheme in SCHEMES, "scheme", scheme, f"one of {tuple(SCHEMES)}")
    if scheme == "prompt":
        return 0
    if scheme == "seed" or (scheme, variant) == ("split", "seed"):
        return link.symbols_at_rate(rate, int(np.prod(latent_shape)))
    return -(-int(np.prod(image_shape if scheme == "centralized" else latent_shape)) // 2)


def codec_statistics(codec: SeedCodec) -> LatentStatistics:
    """Mean, variances and basis of the latents that a codec was trained on; ValueError if it keeps none of them all.

    A codec whose latent is cut into several tiles, or with transform "raw", has no statistics of whole latents.
    """
    config, network = codec.config, nnx.merge(codec.graph, codec.state)
    whole = config.num_tiles == 1 and config.transform == "klt"
    require(whole, "codec", f"{config.num_tiles} tiles, transform {config.transform!r}", "one tile, transform 'klt'")
    return LatentStatistics(network.latent_mean[...], jnp.square(network.scale[...]), network.basis[...])


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


def make_simulator(
    pipe: StableDiffusion,
    codec: SeedCodec | Scheme | None = None,
    scheme: str = "seed",
    fading: Fading | None = None,
    policy: str | Policy = "codec",
    *,
    variant: str | None = None,
    rate: float = 4.0,
    mode: str = "equal_power",
    num_blocks: int = NUM_BLOCKS,
    mapping: str | None = None,
    modulation: str = "16qam",
    image_codec: ImageCodecTable | None = None,
    statistics: SourceStatistics | None = None,
    device_steps: int = 5,
    server_steps: int | None = None,
    weights: BlockWeights | None = None,
    seed_errors: SeedErrors | None = None,
    peak_power: float = float("inf"),
    num_steps: int = 25,
    guided: bool = True,
    sampler: str | None = None,
    decode_batch: int | None = None,
) -> Simulator:
    """The whole of mobile edge generation under one scheme: `simulator(key, simulator.params, ids, snr_db)`.

    Args:
      pipe: the diffusion model of server and device.
      codec: of the seed, a `SeedCodec` or anything with the methods of `megjax.codec.schemes.Scheme`; the statistics of
        a `SeedCodec` also serve the other schemes.
      scheme, variant: of `SCHEMES`. `latent` is received symbol by symbol or by the full-covariance Wiener filter;
        `split` sends the latent or its seed, `prompt` nothing.
      fading: a law of the gains (Rayleigh by default), anything with `sample(key, num_blocks)`.
      policy: of `megjax.power.POLICIES` or an object with `allocate`; "codec" is the load that the code asks for.
      rate: compression ratio r of the seed, of `split` too in its variant "seed".
      mode: of `MODES`.
      mapping: of an analog link's symbols to blocks; "ordered" for the seed and "interleaved" otherwise by default.
      modulation: of the uncoded pixels.
      image_codec: of the coded pixels, by `fit_image_codec` for this fading and mode.
      statistics: constants of analog pixels, and of raw latents without a `SeedCodec`.
      device_steps: denoising steps of the device, of `split` and `prompt`.
      server_steps: of `split` that sends a latent; all of them unless told how many.
      weights: importance of the blocks; by default measured on the codec's validation latents where a policy asks.
      seed_errors: of `split` that sends a seed; by default fitted on the codec's validation latents for this fading.
      peak_power: largest power of a block in units of P.
      num_steps, guided, sampler: of the server's sampling.
      decode_batch: how many images the decoder holds at once.

    Raises:
      ValueError: an unknown name, parts that do not fit each other, or a number out of range.
    """
    require(isinstance(pipe, StableDiffusion), "pipe", type(pipe).__name__, "a StableDiffusion")
    require(not isinstance(codec, StableDiffusion), "codec", type(codec).__name__, "a SeedCodec, a Scheme or None")
    require(isinstance(scheme, str) and scheme in SCHEMES, "scheme", scheme, f"one of {tuple(SCHEMES)}")
    variant = SCHEMES[scheme][0] if variant is None else variant
    require(variant in SCHEMES[scheme], f"variant of {scheme!r}", variant, f"one of {SCHEMES[scheme]}")
    require(mode in MODES, "mode", mode, f"one of {MODES}")
    require(peak_power > 0, "peak_power", peak_power, "positive")
    fading = RayleighFading() if fading is None else fading
    require(callable(getattr(fading, "sample", None)), "fading", fading, "an object with a method sample")
    ready = isinstance(policy, str) or callable(getattr(policy, "allocate", None))
    require(ready, "policy", policy, "a name or an object with a method allocate")
    require(decode_batch is None or decode_batch >= 1, "decode_batch", decode_batch, "at least 1, or None for all")
    learned = codec if isinstance(codec, SeedCodec) else None
    latent_shape = pipe.latent_shape()
    if learned is not None:
        fits = learned.latent_shape == latent_shape
        require(fits, "codec's latent shape", learned.latent_shape, f"the model's, {latent_shape}")
    table = pipe.sampler(sampler, num_steps)
    if server_steps is not None:
        fits = (scheme, variant) == ("split", "latent") and 1 <= server_steps <= table.num_steps
        allowed = f"from 1 to {table.num_steps}, with scheme 'split' only, and not with its variant 'seed'"
        require(fits, "server_steps", server_steps, allowed)
    mapped = scheme in ("seed", "latent") or variant in ("analog", "seed")
    require(mapping is None or mapped, "mapping", mapping, f"None, as {variant!r} of {scheme!r} has its own")
    statistics = SourceStatistics() if statistics is None else statistics
    if learned is None and scheme in ("latent", "split"):
        fits = len(statistics.latent_mean) == latent_shape[2]
        require(fits, "statistics: latent_mean", statistics.latent_mean, f"of {latent_shape[2]} channels")
    parts = _Parts(pipe, codec, learned, statistics, rate, num_blocks, mapping, image_codec)
    made: tuple[Link, Any]
    if scheme == "prompt":
        made = PromptLink(latent_shape, device_steps, num_blocks), ()
    elif variant == "seed":
        made = parts.split_seed(device_steps, fading, seed_errors)
    elif scheme == "split":
        level = 1.0 if server_steps is None else float(table.alpha_bars[server_steps])
        mean, std = latent_moments(learned, statistics)
        constants = SplitConstants(jnp.asarray(mean), jnp.mean(jnp.square(jnp.asarray(std))))
        made = SplitLink(latent_shape, device_steps, level, num_blocks), constants
    elif scheme == "centralized":
        made = parts.centralized(variant, modulation)
    else:
        made = parts.analog(scheme, variant)
    way, parameters = made
    found = make_policy(policy, fading, num_blocks) if isinstance(policy, str) else policy
    if not isinstance(policy, str):
        check_policy(policy, fading, num_blocks, peak_power)
    budget = float(num_symbols("latent", (), latent_shape)) if mode == "equal_energy" else None
    coded = scheme == "seed" or variant == "seed"
    if weights is None and coded and found is not None and not isinstance(found, EqualPower):
        weights = measured_weights(learned, way.analog if variant == "seed" else way)
    negative = np.asarray(pipe.tokenize([""])) if guided else None
    params = {
        **pipe.params,
        "codec": as_pytree(parameters),
        "fading": as_pytree(fading),
        "policy": as_pytree(found),
        "weights": weights,
        "negative_ids": negative,
    }
    return Simulator(
        params,
        pipe.graphs,
        way,
        table,
        pipe.configs.scheduler,
        latent_shape,
        guided,
        server_steps,
        device_steps,
        budget,
        float(peak_power),
        decode_batch,
    )


def measured_weights(
    codec: SeedCodec | None, way: AnalogLink, snr_db: Sequence[float] = WEIGHT_GRID_DB
) -> BlockWeights:
    """Importance of the seed's blocks at these effective SNRs; equal where the codec cannot say."""
    levels = tuple(float(level) for level in snr_db)
    if codec is None or codec.validation is None:
        return BlockWeights(jnp.asarray(levels, jnp.float32), jnp.ones((len(levels), way.num_blocks), jnp.float32))
    rows = [codec.block_weights(way.num_symbols, level, way.num_blocks, way.mapping) for level in levels]
    return BlockWeights(jnp.asarray(levels, jnp.float32), jnp.stack(rows))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What links are made of."""

    pipe: StableDiffusion
    codec: Any
    learned: SeedCodec | None
    statistics: SourceStatistics
    rate: float
    num_blocks: int
    mapping: str | None
    image_codec: ImageCodecTable | None

    def centralized(self, variant: str, modulation: str) -> tuple[Link, Any]:
        """Link and parameters of a form of `centralized`."""
        shape = (*self.pipe.image_size, 3)
        if variant == "qam":
            return QAMLink(shape, modulation, self.num_blocks), ()
        if variant == "coded":
            require(self.image_codec is not None, "image_codec", None, "given, by fit_image_codec")
            found = tuple(self.image_codec.mean_image.shape)
            require(found == shape, "image_codec's image", found, f"of the model's shape, {shape}")
            return CodedImageLink(shape, self.num_blocks), self.image_codec
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.statistics.pixel_mean, self.statistics.pixel_std))
        count = -(-int(np.prod(shape)) // 2)
        return AnalogLink(count, self.num_blocks, self.mapping or "interleaved", "images"), RawScheme(mean, std, shape)

    def analog(self, scheme: str, variant: str) -> tuple[Link, Any]:
        """Link and parameters of `latent` and `seed`."""
        shape = self.pipe.latent_shape()
        count = num_symbols(scheme, (), shape, self.rate)
        link.check_symbols(count, int(np.prod(shape)), self.num_blocks)
        if scheme == "latent":
            mean, std = (jnp.asarray(x) for x in latent_moments(self.learned, self.statistics))
            whole = codec_statistics(self._needs_codec(scheme, variant)) if variant == "wiener" else None
            way = AnalogLink(count, self.num_blocks, self.mapping or "interleaved")
            return way, RawScheme(mean, std, shape, whole)
        way = AnalogLink(count, self.num_blocks, self.mapping or "ordered")
        if variant == "klt":
            return way, KLTScheme(codec_statistics(self._needs_codec(scheme, variant)), shape)
        require(self.codec is not None, "codec", None, "given for scheme 'seed'")
        if self.learned is not None:
            return way, LearnedScheme(self.learned.graph, self.learned.state)
        ready = all(callable(getattr(self.codec, name, None)) for name in ("spending", "encode", "decode"))
        require(ready, "codec", self.codec, "a SeedCodec or an object with methods spending, encode and decode")
        return way, self.codec

    def split_seed(self, device_steps: int, fading: Fading, errors: SeedErrors | None) -> tuple[Link, Any]:
        """Link and parameters of the seed whose decoded latent the device denoises."""
        way, code = self.analog("seed", "learned")
        if errors is None:
            latents = None if self.learned is None else self.learned.validation
            require(
                latents is not None, "codec", self.codec, "a SeedCodec with validation latents, or give seed_errors"
            )
            errors = fit_seed_errors(from_seed(0), code, way, latents, fading, WEIGHT_GRID_DB)
        return SeedSplitLink(way, self.pipe.latent_shape(), device_steps), SeedSplit(as_pytree(code), errors)

    def _needs_codec(self, scheme: str, variant: str) -> SeedCodec:
        require(self.learned is not None, "codec", self.codec, f"a SeedCodec for the {variant!r} variant of {scheme!r}")
        return self.learned


def simulate(
    key: Key[Array, ""] | UInt32[Array, "2"] | int,
    pipe: StableDiffusion,
    codec: SeedCodec | Scheme | None,
    prompts: Sequence[str],
    scheme: str = "seed",
    fading: Fading | None = None,
    snr_db: float = 0.0,
    policy: str | Policy = "codec",
    *,
    realisations: int = 1,
    guidance_scale: float = 3.0,
    **options: Any,
) -> Transmission:
    """Prompts to received images in one call, compiled as one program; `options` are those of `make_simulator`.

    A second call with the same shapes and options does not compile again. `key` may be a seed. Raises ValueError as
    `make_simulator`, and for an SNR that is not a number or no prompts.
    """
    require(check_snr_db(snr_db).ndim == 0, "snr_db", snr_db, "one number in dB")
    key, realisations = as_key(key), require_count("realisations", realisations)
    guidance_scale = require_number("guidance_scale", guidance_scale)
    made = make_simulator(pipe, codec, scheme, fading, policy, guided=guidance_scale > 1, **options)
    ids = pipe.tokenize(prompts)
    return simulators.run(made, key, made.params, ids, jnp.float32(snr_db), jnp.float32(guidance_scale), realisations)
