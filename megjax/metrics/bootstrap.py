"""Bootstrap confidence interval of a mean over images."""

import math

import numpy as np
from jaxtyping import ArrayLike


def bootstrap_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    weights: ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of `values`, resampling its first axis (images) with replacement.

    `values` [n] holds one number per image, or [n m] one per (image, realisation): a resampled image brings all its
    realisations, so the interval speaks of new images. With `weights` [n] it is that of the weighted mean, each
    resample being divided by its own total weight. B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap",
    1993, chapter 13. Of a single image, which tells nothing about others, the interval is (nan, nan). Infinite values,
    such as the PSNR of equal images, make the resamples that hold them infinite. Raises ValueError for no values, NaN
    or infinities of both signs, options out of range, or weights that are not positive and finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim < 1 or values.size == 0:
        raise ValueError(f"values has shape {values.shape}; it needs one image or more")
    if np.isnan(values).any() or (values.min() == -np.inf and values.max() == np.inf):
        raise ValueError("values hold NaN or infinities of both signs, which have no mean; they must be numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be strictly between 0 and 1")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be 1 or more")
    if len(values) == 1:
        return math.nan, math.nan
    per_image = values.reshape(values.shape[0], -1).mean(axis=1)
    rng = np.random.default_rng(seed)
    # How often each image is drawn is multinomial, so a resample's mean is a weighted mean.
    counts = rng.multinomial(per_image.size, np.full(per_image.size, 1 / per_image.size), size=num_resamples)
    weights = np.ones(per_image.size) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != per_image.shape or not np.all((weights > 0) & (weights < np.inf)):
        raise ValueError(
            f"weights has shape {weights.shape}; it needs one positive number for each of {values.shape[0]}"
        )
    infinite = np.isinf(per_image)
    means = counts @ (weights * np.where(infinite, 0.0, per_image)) / (counts @ weights)
    means = np.where((counts[:, infinite] > 0).any(1), per_image.max() + per_image.min(), means)
    # Between a finite and an infinite mean there is nothing to interpolate.
    method = "inverted_cdf" if infinite.any() else "linear"
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], method=method)
    return float(low), float(high)
