"""Kernel Inception Distance: hand-computed values, unbiasedness, and the size of its standard error."""

import itertools

import numpy as np
import pytest

from megjax.metrics import kernel_distance, kid, squared_mmd

TRIALS = 120


def test_hand_computed_value():
    # k(x, y) = (x y + 1)^3: k(0, 1) = 1, k(2, -1) = -1, k(0, 2) = k(0, -1) = 1, k(1, 2) = 27, k(1, -1) = 0.
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [-1.0]])
    assert squared_mmd(x, y) == pytest.approx(1 + -1 - 2 * (1 + 1 + 27 + 0) / 4)


def test_matches_the_sum_over_pairs(monkeypatch):
    monkeypatch.setattr(kid, "ROWS", 3)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(5, 4)) + 1

    def mean_kernel(pairs):
        return np.mean([(np.dot(np.float64(a), b) / 4 + 1) ** 3 for a, b in pairs])

    expected = mean_kernel(itertools.permutations(x, 2)) + mean_kernel(itertools.permutations(y, 2))
    expected -= 2 * mean_kernel(itertools.product(x, y))
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)
    assert squared_mmd(y, x) == pytest.approx(expected, rel=1e-12)


def test_unbiased_for_equal_laws():
    rng = np.random.default_rng(1)
    values = [squared_mmd(rng.normal(size=(30, 6)), rng.normal(size=(20, 6))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert np.min(values) < 0  # what an unbiased estimate of zero must reach


def test_mean_does_not_depend_on_the_size():
    rng = np.random.default_rng(2)
    small, large = (
        [squared_mmd(rng.normal(size=(n, 4)), rng.normal(size=(n, 4)) + 0.5) for _ in range(300)] for n in (10, 60)
    )
    assert abs(np.mean(small) - np.mean(large)) < 4 * np.sqrt((np.var(small) + np.var(large)) / 300)


@pytest.mark.parametrize(
    ("shift", "subset_size", "num_subsets"),
    [
        (0.5, 10, 4),
        pytest.param(0.5, 40, 20, marks=pytest.mark.slow),
        pytest.param(0.0, 40, 20, marks=pytest.mark.slow),
    ],
)
def test_standard_error_is_the_spread_of_repeated_experiments(shift, subset_size, num_subsets):
    rng = np.random.default_rng(3)
    options = dict(num_subsets=num_subsets, subset_size=subset_size)
    results = np.array(
        [
            kernel_distance(rng.normal(size=(120, 4)), rng.normal(size=(120, 4)) + shift, **options)
            for _ in range(TRIALS)
        ]
    )
    spread, stated = np.std(results[:, 0], ddof=1), np.sqrt(np.mean(results[:, 1] ** 2))
    # Standard errors relative to the spread itself: of a standard deviation from TRIALS values, and of a root mean
    # square of TRIALS ones, each from num_subsets values (both for Gaussian values; the squares are skewed, hence 5).
    tolerance = 5 * np.sqrt((1 + 1 / (num_subsets - 1)) / (2 * TRIALS))
    assert stated / spread > 1 - tolerance
    if shift:
        assert stated / spread < 1 + tolerance


def test_subsets_average_to_the_full_estimate():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(80, 5)), rng.normal(size=(90, 5)) + 0.3
    num_subsets = 400
    mean, error = kernel_distance(x, y, num_subsets=num_subsets, subset_size=20)
    values = [kernel_distance(x, y, num_subsets=2, subset_size=20, seed=seed)[0] for seed in range(1, 100)]
    tolerance = 4 * np.std(values) * np.sqrt(2 / num_subsets)
    assert abs(mean - squared_mmd(x, y)) < tolerance
    assert (mean, error) == kernel_distance(x, y, num_subsets=num_subsets, subset_size=20, seed=0)


def test_bad_arguments():
    x = np.zeros((8, 3))
    for arguments, options, name in (
        ((x, x[:, :2]), {}, "features have shapes"),
        ((x[:1], x), {}, "features have shapes"),
        ((x[0], x), {}, "features have shapes"),
        ((x * np.nan, x), {}, "finite"),
        ((x, x), {}, "subset_size is 1000; it must be from 2 to 7"),
        ((x, x), {"subset_size": 8}, "subset_size"),
        ((x, x), {"subset_size": 4, "num_subsets": 1}, "num_subsets"),
    ):
        with pytest.raises(ValueError, match=name):
            kernel_distance(*arguments, **options)
