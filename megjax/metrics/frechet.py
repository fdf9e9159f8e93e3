"""Frechet distance between Gaussians fitted to two sets of features, in float64 on the host."""

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
