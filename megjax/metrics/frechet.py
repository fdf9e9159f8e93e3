"""Frechet distance between Gaussians fitted to two sets of features and its interval, in float64 on the host."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float


def feature_statistics(features: ArrayLike) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, "f f"]]:
    """Mean [f] and unbiased covariance [f f] of features [n f], n >= 2, as float64."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features has shape {features.shape}; it must be [n f] with n of 2 or more")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mean1: ArrayLike, cov1: ArrayLike, mean2: ArrayLike, cov2: ArrayLike) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2), the squared 2-Wasserstein distance of Gaussians.

    Means are [f], covariances [f f]. D. C. Dowson and B. V. Landau, J. Multivariate Analysis 12(3), 1982; the symmetric
    form stays real for singular covariances. The value depends on the number of samples behind the statistics, so
    compare only at equal numbers. Raises ValueError for shapes that differ or values that are not finite.
    """
    arrays = [np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2)]
    mean1, cov1, mean2, cov2 = arrays
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == 2 * mean1.shape:
        raise ValueError(f"shapes are {[x.shape for x in arrays]}; they must be [f], [f f], [f], [f f]")
    if not all(np.all(np.isfinite(x)) for x in arrays):
        raise ValueError("means and covariances must be finite")
    values, vectors = np.linalg.eigh((cov1 + cov1.T) / 2)
    root = np.sqrt(np.maximum(values, 0))[:, np.newaxis] * vectors.T  # root.T @ root = C1
    # root C2 root^T has the eigenvalues of C1^1/2 C2 C1^1/2: both are similar to C1 C2.
    cross = np.linalg.eigvalsh(root @ ((cov2 + cov2.T) / 2) @ root.T)
    return float(
        np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * np.sum(np.sqrt(np.maximum(cross, 0)))
    )


class FrechetInterval(NamedTuple):
    """A Frechet distance with its confidence interval, and the bootstrap's estimate of its upward bias."""

    distance: float
    low: float
    high: float
    bias: float


def frechet_interval(
    features_a: ArrayLike,
    features_b: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 50,
    seed: int = 0,
    paired: bool = False,
) -> FrechetInterval:
    """Frechet distance of two sets of features and its interval over new images, by the bootstrap.

    Features are [n f], or [n r f] for r realisations of each image: a resampled image brings all of them. The two sets
    are resampled apart, or by the same draws if `paired` (item i of both then belongs to one caption or image).

    A resample repeats images, which acts like having fewer of them, and a Frechet distance grows as samples get fewer:
    resampled distances lie above the distance itself, and their quantiles need not even contain it. So only their
    spread s is used: the interval is distance -+ z s, cut at zero (B. Efron and R. J. Tibshirani, "An Introduction to
    the Bootstrap", 1993, section 13.3), which also needs far fewer resamples than quantiles do. It is about the
    expected distance *at this number of images*, not about the limit of many; s is too large rather than too small
    where the laws agree or n is not far above f. `bias` is the mean of the resampled distances less the distance:
    distance - bias estimates the limit of many images, well only where bias is a small part of the distance.

    A resample costs two passes over the features and two f x f eigendecompositions. Raises ValueError for shapes that
    do not fit, values that are not finite, or options out of range.
    """
    a, b = _per_image(features_a, "features_a"), _per_image(features_b, "features_b")
    if a.shape[2] != b.shape[2]:
        raise ValueError(f"features_a has {a.shape[2]} features and features_b {b.shape[2]}; they must agree")
    if paired and len(a) != len(b):
        raise ValueError(f"paired resampling needs equally many images; features_a has {len(a)}, features_b {len(b)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be strictly between 0 and 1")
    if num_resamples < 2:
        raise ValueError(f"num_resamples is {num_resamples}; it must be 2 or more")
    rng = np.random.default_rng(seed)
    distance = frechet_distance(*_weighted_statistics(a, np.ones(len(a))), *_weighted_statistics(b, np.ones(len(b))))
    values = []
    for _ in range(num_resamples):
        counts_a = _draw(rng, len(a))
        counts_b = counts_a if paired else _draw(rng, len(b))
        values.append(frechet_distance(*_weighted_statistics(a, counts_a), *_weighted_statistics(b, counts_b)))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(values, ddof=1))
    return FrechetInterval(distance, max(distance - reach, 0.0), distance + reach, float(np.mean(values)) - distance)


def _per_image(features: ArrayLike, name: str) -> Float[np.ndarray, "n r f"]:
    """Features as [n r f] float64, checked."""
    features = np.asarray(features, np.float64)
    if features.ndim not in (2, 3) or len(features) < 2 or 0 in features.shape:
        raise ValueError(f"{name} has shape {features.shape}; it must be [n f] or [n r f] with n of 2 or more")
    if not np.all(np.isfinite(features)):
        raise ValueError(f"{name} must be finite")
    return features if features.ndim == 3 else features[:, np.newaxis]


def _draw(rng: np.random.Generator, num: int) -> Float[np.ndarray, " n"]:
    """How often each of `num` images is drawn in one resample."""
    return rng.multinomial(num, np.full(num, 1 / num)).astype(np.float64)


def _weighted_statistics(
    features: Float[np.ndarray, "n r f"], counts: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, "f f"]]:
    """What `feature_statistics` gives when image i and its realisations are present counts[i] times."""
    num, realisations, size = features.shape
    total = counts.sum() * realisations
    mean = (counts @ features.reshape(num, -1)).reshape(realisations, size).sum(axis=0) / total
    centred = ((features - mean) * np.sqrt(counts)[:, np.newaxis, np.newaxis]).reshape(num * realisations, size)
    return mean, centred.T @ centred / (total - 1)
