"""Schemes that bring an image from the edge server to the device over a fading link."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from megjax.channel import MAPPINGS, Fading, equalize_lmmse, pack, transmit, unpack
from megjax.channel.numerics import squared_magnitude
from megjax.codec import SeedCodec, SeedNetwork, link
from megjax.configs import from_mapping, read_json, require, write_json
from megjax.diffusion import generation
from megjax.diffusion.pipeline import StableDiffusion
from megjax.metrics import psnr
from megjax.power import Policy, Problem
from megjax.units import db_to_linear, noise_var_from_snr_db

SCHEMES = ("centralized", "latent", "seed")
NUM_BLOCKS = 16
"""Fading blocks per image, T, unless said otherwise."""
STATISTICS_NAME = "source_statistics.json"


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """Per-channel mean and standard deviation of the training set's pixels (in [0, 1]) and scaled latents.

    Both ends know them: they bring what is sent to zero mean and unit variance, hence symbols to unit mean power over
    the data.
    """

    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.25, 0.25, 0.25)
    latent_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    latent_std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self):
        for kind in ("pixel", "latent"):
            mean, std = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_std")
            require(len(mean) == len(std), f"{kind}_std", std, f"as long as {kind}_mean ({len(mean)})")
            require(all(value > 0 for value in std), f"{kind}_std", std, "positive")

    @classmethod
    def load(cls, folder: Path, latent_channels: int = 4) -> "SourceStatistics":
        """Read them from a model folder; a model without them gets nominal ones, with a warning."""
        path = Path(folder) / STATISTICS_NAME
        if not path.is_file():
            warnings.warn(
                f"{folder} has no {STATISTICS_NAME}: pixels are taken as 0.5 +- 0.25 and latents as unit Gaussian, so "
                "transmit power is only nominally 1",
                stacklevel=2,
            )
            return cls(latent_mean=(0.0,) * latent_channels, latent_std=(1.0,) * latent_channels)
        return from_mapping(cls, read_json(path), source=str(path))

    def save(self, folder: Path) -> None:
        """Write them to a model folder."""
        write_json(Path(folder) / STATISTICS_NAME, dataclasses.asdict(self))


def num_symbols(scheme: str, image_shape: tuple[int, ...], latent_shape: tuple[int, ...], rate: float = 4.0) -> int:
    """Complex channel uses K of one image.

    3HW/2 for analog pixels (`centralized`), hwc/2 for the raw `latent`, hwc/(2r) for the `seed` at compression ratio
    `rate`. ValueError for another scheme or a rate that gives no symbol.
    """
    require(scheme in SCHEMES, "scheme", scheme, f"one of {SCHEMES}")
    if scheme == "seed":
        return link.symbols_at_rate(rate, int(np.prod(latent_shape)))
    return -(-int(np.prod(image_shape if scheme == "centralized" else latent_shape)) // 2)


def send_values(
    key: Key[Array, ""],
    values: Float[Array, "*d c"],
    mean: ArrayLike,
    std: ArrayLike,
    fading: Fading,
    snr_db: Float[ArrayLike, ""],
    num_blocks: int = NUM_BLOCKS,
    mapping: str = "interleaved",
    policy: Policy | None = None,
) -> Float[Array, "*d c"]:
    """Analog transmission at mean power P = 1 of values with these per-channel constants; LMMSE-received.

    Blocks have equal power, or what `policy` gives equally important ones. One realisation: `key` gives the gains of
    `num_blocks` fading blocks and the noise, so two schemes that are given the same key see the same gains. 1 / sigma^2
    is `snr_db`.
    """
    fading_key, noise_key = jax.random.split(key)
    mean, std = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), values.shape) for x in (mean, std))
    symbols = pack(((values - mean) / std).reshape(-1), num_blocks, mapping)
    gains = fading.sample(fading_key, num_blocks)
    noise_var = noise_var_from_snr_db(snr_db)
    equal = jnp.ones(num_blocks)
    power = _powers(policy, gains, noise_var, equal, equal)
    received = transmit(noise_key, symbols, gains, power, noise_var)
    estimate = unpack(equalize_lmmse(received, gains, power, noise_var), values.size, mapping)
    return estimate.reshape(values.shape) * std + mean


def send_image(
    key: Key[Array, ""],
    image: Float[Array, "h w c"],
    statistics: SourceStatistics,
    fading: Fading,
    snr_db: Float[ArrayLike, ""],
    num_blocks: int = NUM_BLOCKS,
    policy: Policy | None = None,
) -> Float[Array, "h w c"]:
    """Scheme `centralized`, analog: the server finishes the image and sends its pixels; the result is in [0, 1]."""
    mean, std = np.array(statistics.pixel_mean), np.array(statistics.pixel_std)
    return jnp.clip(send_values(key, image, mean, std, fading, snr_db, num_blocks, policy=policy), 0.0, 1.0)


def send_latent(
    key: Key[Array, ""],
    latent: Float[Array, "h w c"],
    statistics: SourceStatistics,
    fading: Fading,
    snr_db: Float[ArrayLike, ""],
    num_blocks: int = NUM_BLOCKS,
    policy: Policy | None = None,
) -> Float[Array, "h w c"]:
    """Scheme `latent`: the server sends the raw latent, which the device is left to decode."""
    mean, std = np.array(statistics.latent_mean), np.array(statistics.latent_std)
    return send_values(key, latent, mean, std, fading, snr_db, num_blocks, policy=policy)


def _powers(policy: Policy | None, gains, noise_var, weights, default) -> Float[Array, " t"]:
    """Power of the blocks by a policy at mean power 1; `default` [t] without one."""
    if policy is None:
        return default
    problem = Problem(1 / noise_var, weights, jnp.float32(gains.shape[0]), jnp.float32(jnp.inf))
    return policy.allocate(squared_magnitude(gains), problem)


def send_seed(
    key: Key[Array, ""],
    latent: Float[Array, "h w c"],
    network: SeedNetwork,
    fading: Fading,
    snr_db: Float[ArrayLike, ""],
    num_symbols: int,
    num_blocks: int = NUM_BLOCKS,
    mapping: str = "ordered",
    policy: Policy | None = None,
    weights: Float[Array, " t"] | None = None,
) -> Float[Array, "h w c"]:
    """Scheme `seed`: the server sends the first K symbols of the codec's code, at mean power P = 1.

    Blocks are loaded as the codec asks, or as `policy` does for their `weights` (all 1 unless given). One realisation;
    `key` gives the same gains as in `send_values`. ValueError for a bad number of symbols or mapping.
    """
    fading_key, noise_key = jax.random.split(key)
    values = network.encode(latent[None], snr_db, num_symbols)[0]
    spending = link.spending(network.spend(snr_db, num_symbols), num_symbols, num_blocks, mapping)
    gains = fading.sample(fading_key, num_blocks)
    noise_var = noise_var_from_snr_db(snr_db)
    weights = jnp.ones(num_blocks) if weights is None else weights
    power = _powers(policy, gains, noise_var, weights, spending.load)
    received = link.send_code(noise_key, values, spending, gains, power, noise_var, num_symbols, mapping)
    levels = (jnp.full(1, snr_db, jnp.float32), jnp.full(1, num_symbols))
    return network.decode(received.estimate[None], received.snr[None], *levels)[0]


def image_quality(
    pipe: StableDiffusion,
    codec: SeedCodec,
    latents: Float[Array, "n h w c"],
    num_symbols: int,
    mapping: str = "ordered",
    reference: Callable[[Float[Array, " t"], Float[Array, ""]], Float[Array, " t"]] | None = None,
) -> Callable[..., Float[Array, ""]]:
    """`(key, gains [t], power [t], snr_db) -> PSNR` in dB of the image decoded from a seed sent at these powers.

    The key draws one of `latents` and the noise; the PSNR is against the image decoded from the clean latent. With
    `reference(power gains [t], snr_db) -> power [t]` the result is the gain over those powers on the same image, gains
    and noise, which spreads far less. Made for `PowerControl(quality=...)`. ValueError for a bad number of symbols or
    mapping.
    """
    network: SeedNetwork = nnx.merge(codec.graph, codec.state)
    link.check_symbols(num_symbols, codec.config.num_values, 1)
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    latents = jnp.asarray(latents)
    originals = jnp.concatenate([pipe.decode(latents[i : i + 100]) for i in range(0, len(latents), 100)])

    def quality(key, gains, power, snr_db):
        image_key, noise_key = jax.random.split(key)
        index = jax.random.randint(image_key, (), 0, len(latents))
        spending = link.spending(network.spend(snr_db, num_symbols), num_symbols, gains.shape[0], mapping)
        values = network.encode(latents[index][None], snr_db, num_symbols)[0]
        levels = jnp.full(1, snr_db, jnp.float32), jnp.full(1, num_symbols)

        def decode(power):
            received = link.send_code(
                jax.random.clone(noise_key), values, spending, gains, power, db_to_linear(-snr_db), num_symbols, mapping
            )
            return network.decode(received.estimate[None], received.snr[None], *levels)[0]

        sent = [decode(power)]
        if reference is not None:
            sent.append(decode(reference(squared_magnitude(gains), snr_db)))
        images = generation.decode(pipe.graphs, pipe.params, jnp.stack(sent))
        found = psnr(originals[index], images[0])
        return found if reference is None else found - psnr(originals[index], images[1])

    return quality
