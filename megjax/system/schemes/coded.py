"""Centralized, coded: finished images by JPEG or WebP over an ideal capacity-achieving channel code, with outage."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree
from PIL import Image

from megjax.channel import Fading
from megjax.configs import require
from megjax.keys import threefry
from megjax.numerics import squared_magnitude
from megjax.power.problem import check_num_blocks
from megjax.system.protocol import Code, Link, Source, mean_power
from megjax.system.schemes.base import SCHEMES, WEIGHT_GRID_DB, Parts, Scheme
from megjax.units import check_snr_db, db_to_linear, linear_to_db

OPTIONS = (
    *(("jpeg", quality) for quality in (2, 5, 10, 20, 35, 50, 65, 80, 92)),
    *(("webp", quality) for quality in (0, 5, 15, 30, 50, 70, 85, 95)),
)
"""Image codecs and their qualities, of which each SNR has the best one."""
_RATES = np.geomspace(0.02, 12.0, 60)
"""Spectral efficiencies R in bits per symbol to choose from."""
DECODED_AT_ONCE = 50
"""Validation latents whose images are decoded at a time."""
_GRID_DB = np.arange(-50.0, 45.01, 0.5)
_WEBP_KNOWN = 7
"""Bytes of a VP8 key frame's header that both ends know: start code, width and height (RFC 6386, section 9.1)."""


class ImageCodecTable(NamedTuple):
    """Parameters of a `CodedImageLink`: the choice for each 1 / sigma^2 of a grid, and what an outage shows."""

    snr_db: Float[Array, " g"]
    choice: Int[Array, " g"]
    """Index into `OPTIONS`."""
    rate: Float[Array, " g"]
    """R in bits per symbol."""
    mean_image: Float[Array, "H W 3"]


def compress(images: Float[ArrayLike, "b H W 3"], codec: str, quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [b] and decoded images [b H W 3] in [0, 1] of images by a codec of `OPTIONS`, on the host.

    What both ends can know is not counted:

    - JPEG (4:2:0 chroma) counts its entropy-coded data, by the Huffman tables of the standard (ITU-T T.81, annex K) or,
      with a bit that says so, by tables of the image's own, which then count; whichever is shorter.
    - WebP (lossy, at its slowest and best method) counts the VP8 frame without its container, start code and size.

    Raises ValueError for another codec, or images that are not finite numbers in [0, 1] (but for 1e-3 of rounding).
    """
    require(codec in ("jpeg", "webp"), "codec", codec, "'jpeg' or 'webp'")
    images = np.asarray(images, np.float32)
    ends = (float(images.min()), float(images.max())) if images.size else (0.0, 1.0)
    inside = ends[0] >= -1e-3 and ends[1] <= 1 + 1e-3  # false for NaN
    require(inside, "images from smallest to largest", ends, "within [0, 1]")
    levels = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    sizes, decoded = np.zeros(len(levels), np.float32), np.zeros(levels.shape, np.float32)
    for i, picture in enumerate(levels):
        if codec == "jpeg":
            data = _encode(picture, "JPEG", quality)
            own = sum(_jpeg_bytes(_encode(picture, "JPEG", quality, optimize=True)))
            sizes[i] = 1 / 8 + min(_jpeg_bytes(data)[0], own)
        else:
            data = _encode(picture, "WEBP", quality, method=6)
            sizes[i] = _webp_bytes(data)
        decoded[i] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255
    return sizes, decoded


def _encode(picture: np.ndarray, codec: str, quality: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, codec, quality=quality, **options)
    return buffer.getvalue()


def _jpeg_bytes(data: bytes) -> tuple[int, int]:
    """Bytes of a JPEG file's entropy-coded data, and of its Huffman tables (segments DHT, with their markers)."""
    position, tables = 2, 0
    while True:
        marker, length = data[position + 1], 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        position += length
        if marker == 0xDA:  # what follows the header of the scan, up to the marker of the end
            return len(data) - position - 2, tables
        tables += length if marker == 0xC4 else 0


def _webp_bytes(data: bytes) -> int:
    """Bytes of a WebP file's VP8 frame that the receiver does not know."""
    position = 12
    while data[position : position + 4] != b"VP8 ":
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return int.from_bytes(data[position + 4 : position + 8], "little") - _WEBP_KNOWN


def outage_table(key: Key[Array, ""], fading: Fading, num_blocks: int, draws: int = 4000) -> np.ndarray:
    """P(mean_t log2(1 + snr g_t) < R) at equal power, [levels rates], over the grids of this module."""

    def capacities(key):
        gains = squared_magnitude(fading.sample(key, num_blocks))
        snr = db_to_linear(jnp.asarray(_GRID_DB, jnp.float32))
        return jnp.mean(jnp.log2(1 + snr[:, None] * gains[None]), axis=1)

    drawn = np.sort(np.asarray(jax.jit(jax.vmap(capacities))(jax.random.split(threefry(key), draws))), axis=0)
    return np.stack([np.searchsorted(column, _RATES, side="left") for column in drawn.T]) / draws


def fit_image_codec(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b H W 3"],
    fading: Fading,
    snr_db: Float[ArrayLike, "*g"] | Sequence[float],
    energy: float | None = None,
    num_blocks: int = 16,
    max_symbols: float | None = None,
) -> ImageCodecTable:
    """Codec, quality and R of least mean image MSE, outages included, at every one of the SNRs [g] (1 / sigma^2).

    Mean K is at most `max_symbols`, by default that of analog pixels, 3 H W / 2: at given power, error would otherwise
    always be traded for symbols without end.

    `images` are training images. R is one number for each SNR and quality, so an image of B bytes has
    K = ceil(8 B / R) symbols, whether it arrives or not; in outage the mean of `images` is shown. `energy` as in
    `Link.code`: at a given energy P depends on the image through K. For use outside jit. Raises ValueError for SNRs
    that are not finite, no images, fewer than one block, an energy that is not positive, or too few symbols.
    """
    levels = np.atleast_1d(check_snr_db(snr_db))
    images = np.asarray(images, np.float32)
    require(images.ndim == 4 and len(images) > 0, "images' shape", images.shape, "[b H W 3], one image or more")
    require(energy is None or 0 < energy < np.inf, "energy", energy, "positive and finite, or None for power 1")
    check_num_blocks(num_blocks)
    mean_image = images.mean(0)
    lost = np.square(images - mean_image[None]).mean((1, 2, 3))
    outage = outage_table(key, fading, num_blocks)
    limit = images[0].size / 2 if max_symbols is None else max_symbols
    best = [(np.inf, 0, 0.0)] * len(levels)
    for index, option in enumerate(OPTIONS):
        sizes, decoded = compress(images, *option)
        error = np.square(images - decoded).mean((1, 2, 3))
        counts = np.ceil(8 * sizes[:, None] / _RATES[None])
        gain_db = np.zeros_like(counts) if energy is None else np.asarray(linear_to_db(energy / counts))
        for g, level in enumerate(levels):
            lost_share = _interpolate(outage, level + gain_db)
            mse = np.mean((1 - lost_share) * error[:, None] + lost_share * lost[:, None], axis=0)
            mse = np.where(counts.mean(0) <= limit, mse, np.inf)
            chosen = int(np.argmin(mse))
            best[g] = min(best[g], (float(mse[chosen]), index, float(_RATES[chosen])))
    affordable = all(np.isfinite(mse) for mse, _, _ in best)
    require(affordable, "max_symbols", limit, "enough for the coarsest image at the highest rate")
    return ImageCodecTable(
        jnp.asarray(levels, jnp.float32),
        jnp.asarray([choice for _, choice, _ in best], jnp.int32),
        jnp.asarray([rate for _, _, rate in best], jnp.float32),
        jnp.asarray(mean_image, jnp.float32),
    )


def _interpolate(outage: np.ndarray, level_db: np.ndarray) -> np.ndarray:
    """Outage probabilities [b rates] at effective SNRs [b rates]."""
    place = np.clip((level_db - _GRID_DB[0]) / (_GRID_DB[1] - _GRID_DB[0]), 0, len(_GRID_DB) - 1.001)
    row = place.astype(int)
    share, columns = place - row, np.arange(len(_RATES))[None]
    return (1 - share) * outage[row, columns] + share * outage[row + 1, columns]


@dataclasses.dataclass(frozen=True)
class CodedImageLink:
    """Images by the codec, quality and rate that an `ImageCodecTable` has for the nearest SNR.

    The image codec runs on the host, by a callback, once for each image and SNR. An image arrives whole if
    mean_t log2(1 + gamma_t) >= R, and is shown as the mean training image otherwise.
    """

    image_shape: tuple[int, int, int]
    num_blocks: int = 16
    num_symbols: ClassVar[None] = None
    result: ClassVar[str] = "images"
    on_host: ClassVar[bool] = True

    def __post_init__(self):
        check_num_blocks(self.num_blocks)

    def code(self, params: ImageCodecTable, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """The images as decoded by the receiver; K and P are those of each image."""
        nearest = jnp.argmin(jnp.abs(params.snr_db - snr_db))
        sizes = jax.ShapeDtypeStruct((len(source.images),), jnp.float32)
        shapes = sizes, jax.ShapeDtypeStruct(source.images.shape, jnp.float32)
        choice = params.choice[nearest]
        made = jax.pure_callback(_compress_choice, shapes, source.images, choice, vmap_method="sequential")
        sizes, decoded = made
        count, rate = jnp.ceil(8 * sizes / params.rate[nearest]), params.rate[nearest]
        return Code(decoded, rate, count, mean_power(count, energy), jnp.ones(self.num_blocks, jnp.float32))

    def transmit(self, params, key, payload, shared, gains, power, noise_var) -> Float[Array, "H W 3"]:
        """The image, or the mean training image in outage; `key` is unused, as noise is in the capacity."""
        return jnp.where(self.arrives(shared, gains, power, noise_var), payload, params.mean_image)

    def decode(
        self, params: ImageCodecTable, received: Float[Array, "n H W 3"], shared: PyTree
    ) -> Float[Array, "n H W 3"]:
        """The same images."""
        return received

    @staticmethod
    def arrives(rate: Float[Array, ""], gains, power, noise_var) -> Bool[Array, ""]:
        """Whether a realisation carries R bits per symbol."""
        return jnp.mean(jnp.log2(1 + power * squared_magnitude(gains) / noise_var)) >= rate


def _compress_choice(images, choice) -> tuple[np.ndarray, np.ndarray]:
    return compress(images, *OPTIONS[int(choice)])


@SCHEMES.register
@dataclasses.dataclass(frozen=True)
class CentralizedCoded(Scheme):
    """Finished images by JPEG or WebP over an ideal channel code, quality and rate chosen for each SNR."""

    name: ClassVar[str] = "centralized-coded"
    title: ClassVar[str] = "centralized, coded"
    version: ClassVar[int] = 1
    rank: ClassVar[int] = 70
    result: ClassVar[str] = "images"

    def num_symbols(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> None:
        """None: each image has its own."""

    def fit(self, parts: Parts) -> ImageCodecTable:
        """The choices at the SNRs that will be asked for, or from -15 to 35 dB, on the training pictures.

        Where there are none, the images of the codec's validation latents stand in.
        """
        if parts.training_images is not None:
            images = parts.training_images()
        else:
            latents = None if parts.learned is None else parts.learned.validation
            allowed = "a SeedCodec with validation latents, or give `fitted`, made by fit_image_codec"
            require(latents is not None, f"codec of scheme {self.name!r}", parts.codec, allowed)
            images = np.asarray(parts.pipe.decode(latents, DECODED_AT_ONCE))
        levels = parts.snr_db or WEIGHT_GRID_DB
        return fit_image_codec(parts.key, images, parts.fading, levels, parts.energy, parts.num_blocks)

    def build(self, parts: Parts, fitted: ImageCodecTable) -> tuple[Link, Any]:
        """A `CodedImageLink` and the table of choices."""
        found = tuple(fitted.mean_image.shape)
        require(found == parts.image_shape, "fitted's image", found, f"of the model's shape, {parts.image_shape}")
        return CodedImageLink(parts.image_shape, parts.num_blocks), fitted
