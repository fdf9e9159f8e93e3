"""PSNR and SSIM of one pair of images with values in [0, 1], channels last; the caller vmaps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megjax.configs import require
from megjax.metrics.base import METRICS, Metric, Received
from megjax.units import linear_to_db

WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with dynamic range L = 1


def psnr(reference: Float[Array, "h w c"], image: Float[Array, "h w c"]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean squared error (peak 1).

    Identical images give +inf, which a mean over pairs then shows: nothing is capped. Raises ValueError unless both are
    of one shape [h w c] and of real numbers, not integers.
    """
    _check_pair(reference, image)
    return -linear_to_db(jnp.mean(jnp.square(reference.astype(jnp.float32) - image.astype(jnp.float32))))


def ssim(reference: Float[Array, "h w c"], image: Float[Array, "h w c"]) -> Float[Array, ""]:
    """Structural similarity in [-1, 1], the mean over channels and over the positions where the window fits.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE Trans. Image
    Processing 13(4), 2004, equation 13, with an 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03 and population
    variances. Raises ValueError for images smaller than the window, and as `psnr` does.
    """
    _check_pair(reference, image)
    if min(reference.shape[:2]) < WINDOW_SIZE:
        raise ValueError(f"reference has shape {reference.shape}; SSIM needs {WINDOW_SIZE} rows and columns or more")
    x, y = reference.astype(jnp.float32), image.astype(jnp.float32)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return jnp.mean(luminance * (2 * cov + C2) / (var_x + var_y + C2))


def _check_pair(reference, image) -> None:
    shapes = jnp.shape(reference), jnp.shape(image)
    require(len(shapes[0]) == 3, "reference's shape", shapes[0], "[h w c]: one image, the caller vmaps")
    require(shapes[0] == shapes[1], "image's shape", shapes[1], f"the reference's, {shapes[0]}")
    for name, x in (("reference", reference), ("image", image)):
        dtype = jnp.result_type(x)
        require(jnp.issubdtype(dtype, jnp.floating), f"{name}'s type", dtype.name, "real, with values in [0, 1]")


def _blur(maps: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Gaussian window over the valid region, rows and then columns; shifted sums, which XLA fuses on every backend."""
    offsets = np.arange(WINDOW_SIZE) - WINDOW_SIZE // 2
    window = np.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    weights = (window / window.sum()).tolist()
    rows, columns = (size - WINDOW_SIZE + 1 for size in maps.shape[1:3])
    maps = sum(weight * maps[:, i : i + rows] for i, weight in enumerate(weights))
    return sum(weight * maps[:, :, i : i + columns] for i, weight in enumerate(weights))


def _pairwise(function):
    """A metric of two images over all receptions [b r]."""

    def compute(received: Received) -> Float[Array, "b r"]:
        return jax.vmap(jax.vmap(function, (None, 0)))(received.references, received.images)

    return compute


METRICS.register(
    Metric(
        name="psnr_db",
        title="PSNR (dB)",
        version=1,
        rank=10,
        compute=_pairwise(psnr),
        needs=("images",),
        form=".2f",
    )
)
METRICS.register(
    Metric(name="ssim", title="SSIM", version=1, rank=20, compute=_pairwise(ssim), needs=("images",), panel=False)
)
