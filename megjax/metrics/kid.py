"""Kernel Inception Distance: unbiased squared maximum mean discrepancy of features, in float64 on the host."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import ArrayLike, Float

ROWS = 1024  # kernel values held at a time are ROWS times the number of features


def squared_mmd(features1: ArrayLike, features2: ArrayLike) -> float:
    """Unbiased estimate from all pairs of features [n f] and [m f] of the squared maximum mean discrepancy.

    The kernel is (x . y / f + 1)^3. M. Binkowski et al., "Demystifying MMD GANs", ICLR 2018; A. Gretton et al., "A
    kernel two-sample test", JMLR 13, 2012, equation 3. Unlike a Frechet distance its mean does not depend on n and m,
    and it may fall below zero. Time grows as (n + m)^2 f. Raises ValueError for sets of fewer than two, of different
    feature counts, or not finite.
    """
    x, y = _validated(features1, features2)
    n, m = len(x), len(y)
    same = _mean_off_diagonal(x) + _mean_off_diagonal(y)
    return float(same - 2 * sum(np.sum(block) for block in _kernel_rows(x, y)) / (n * m))


def kernel_distance(
    features1: ArrayLike, features2: ArrayLike, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception Distance and its standard error: `squared_mmd` averaged over random subsets of both sets.

    Features are [n f] and [m f], with Inception features for a KID proper. A subset takes `subset_size` items of each
    set without replacement, as in Binkowski et al. 2018. Subsets share items, so their spread over sqrt(num_subsets)
    would promise too much: with a share q = subset_size / min(n, m) two subsets correlate by q, hence the standard
    error is s sqrt((1 / num_subsets + (1 - 1 / num_subsets) q) / (1 - q)) for a spread s between subsets. That is right
    to first order in 1 / n for sets of one size and laws that differ, and on the large side otherwise. Items are taken
    as independent: average or pick one of several realisations of an image beforehand. Raises ValueError as
    `squared_mmd` does, for fewer than two subsets, or for subsets that do not leave an item out.
    """
    x, y = _validated(features1, features2)
    smallest = min(len(x), len(y))
    if num_subsets < 2:
        raise ValueError(f"num_subsets is {num_subsets}; it must be 2 or more")
    if not 2 <= subset_size < smallest:
        raise ValueError(f"subset_size is {subset_size}; it must be from 2 to {smallest - 1}, below the smaller set")
    rng = np.random.default_rng(seed)
    values = [
        squared_mmd(*(features[rng.choice(len(features), subset_size, replace=False)] for features in (x, y)))
        for _ in range(num_subsets)
    ]
    shared = subset_size / smallest
    inflation = (1 / num_subsets + (1 - 1 / num_subsets) * shared) / (1 - shared)
    return float(np.mean(values)), float(np.std(values, ddof=1) * np.sqrt(inflation))


def _validated(features1: ArrayLike, features2: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(features1, np.float64), np.asarray(features2, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2 or x.shape[1] < 1:
        raise ValueError(f"features have shapes {x.shape} and {y.shape}; they must be [n f] and [m f], n and m above 1")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("features1 and features2 must be finite")
    return x, y


def _kernel_rows(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"]) -> Iterator[np.ndarray]:
    for start in range(0, len(x), ROWS):
        yield (x[start : start + ROWS] @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(x: Float[np.ndarray, "n f"]) -> float:
    n = len(x)
    diagonal = (np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3
    return (sum(np.sum(block) for block in _kernel_rows(x, x)) - np.sum(diagonal)) / (n * (n - 1))
