"""Tests of the Frechet distance against closed forms and SciPy's matrix square root, and of its interval."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from megjax.metrics import feature_statistics, frechet, frechet_distance, frechet_interval


def random_statistics(seed, size=16, rank=64):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, rank)) / np.sqrt(rank)
    return rng.normal(size=size), root @ root.T


def test_matches_the_matrix_square_root():
    (mean1, cov1), (mean2, cov2) = random_statistics(0), random_statistics(1)
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(mean2, cov2, mean1, cov1), expected, rtol=1e-9)


def test_fewer_samples_than_features():
    rng = np.random.default_rng(5)
    scale = np.logspace(-2, 1, 64)
    a, b = (feature_statistics(scale * rng.normal(size=(20, 64)) + shift) for shift in (0.0, 0.1))
    # The matrix square root of SciPy is ill conditioned here; tr (C1 C2)^1/2 is also the nuclear norm of R1 R2^T.
    roots = [np.linalg.svd(cov)[1] ** 0.5 * np.linalg.svd(cov)[0] for _, cov in (a, b)]
    cross = np.sum(np.linalg.svd(roots[0].T @ roots[1], compute_uv=False))
    expected = np.sum((a[0] - b[0]) ** 2) + np.trace(a[1]) + np.trace(b[1]) - 2 * cross
    np.testing.assert_allclose(frechet_distance(*a, *b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(*b, *a), expected, rtol=1e-6)


def test_hand_computed_value():
    # Diagonal covariances: |m|^2 + sum (sqrt a - sqrt b)^2 = 25 + (1 - 2)^2 + (3 - 1)^2.
    zero = np.zeros(2)
    assert frechet_distance(zero, np.diag([1.0, 9.0]), np.array([3.0, 4.0]), np.diag([4.0, 1.0])) == pytest.approx(30.0)


def test_zero_for_equal_statistics_even_when_singular():
    for rank in (64, 3):
        mean, cov = random_statistics(2, rank=rank)
        assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6
    point = np.zeros((4, 4))
    np.testing.assert_allclose(frechet_distance(np.zeros(4), point, np.zeros(4), np.eye(4)), 4.0)


def test_statistics():
    features = np.random.default_rng(3).normal(size=(50, 5)).astype(np.float32)
    mean, cov = feature_statistics(features)
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(mean, features.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(cov, centred.T @ centred / 49, atol=1e-12)
    assert mean.dtype == cov.dtype == np.float64


def test_bad_arguments():
    mean, cov = random_statistics(4)
    with pytest.raises(ValueError, match="shapes are"):
        frechet_distance(mean, cov, mean[:3], cov[:3, :3])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, cov, mean, cov * np.nan)
    with pytest.raises(ValueError, match="features has shape"):
        feature_statistics(np.zeros((1, 4)))


def laws(rng, num, size=8, shift=0.3):
    """Features of two Gaussian laws."""
    scale = np.linspace(0.5, 2, size)
    return scale * rng.normal(size=(num, size)), scale ** (1 - shift) * rng.normal(size=(num, size)) + shift


def test_weights_are_copies():
    features = np.random.default_rng(6).normal(3.0, 1.0, size=(6, 2, 3))
    counts = np.array([2, 0, 1, 3, 0, 0])
    copies = feature_statistics(np.repeat(features, counts, axis=0).reshape(-1, 3))
    for weighted, copied in zip(frechet._weighted_statistics(features, counts.astype(float)), copies, strict=True):
        np.testing.assert_allclose(weighted, copied, rtol=1e-12, atol=1e-14)


def test_interval_is_about_the_distance_at_this_number_of_images():
    rng = np.random.default_rng(7)
    trials = 100
    pairs = [laws(rng, 200) for _ in range(trials)]
    intervals = [frechet_interval(*pair, num_resamples=30, seed=seed) for seed, pair in enumerate(pairs)]
    distances = np.array([interval.distance for interval in intervals])
    np.testing.assert_allclose(
        distances[0], frechet_distance(*feature_statistics(pairs[0][0]), *feature_statistics(pairs[0][1]))
    )
    centre = distances.mean()
    covered = np.mean([low <= centre <= high for _, low, high, _ in intervals])
    # Coverage is nominal or above; 4 standard errors of a share of 0.95, and the t quantile instead of the normal one.
    assert covered >= 0.94 - 4 * np.sqrt(0.95 * 0.05 / trials)
    bias = np.mean([interval.bias for interval in intervals])
    true_distance = 8 * 0.3**2 + np.sum((np.linspace(0.5, 2, 8) - np.linspace(0.5, 2, 8) ** 0.7) ** 2)
    # The plug-in distance is above that of the laws, and the bootstrap finds most of how much.
    assert 0.5 < bias / (centre - true_distance) < 1.5


def test_interval_resamples_images_not_realisations():
    a, b = laws(np.random.default_rng(8), 100)
    one = frechet_interval(a, b, num_resamples=20)
    repeated = frechet_interval(np.repeat(a[:, np.newaxis], 50, axis=1), b, num_resamples=20)
    # The same draws of the same images; only the n - 1 of the covariance differs.
    np.testing.assert_allclose(repeated, one, rtol=0.05)
    assert one == frechet_interval(a, b, num_resamples=20, seed=0)
    assert one != frechet_interval(a, b, num_resamples=20, seed=1)


def test_paired_resampling_sees_a_common_part():
    a, _ = laws(np.random.default_rng(9), 200)
    shifted = a + 0.5  # distance 8 * 0.25 in every joint resample
    paired = frechet_interval(a, shifted, paired=True, num_resamples=10)
    np.testing.assert_allclose(paired[:3], 2.0, rtol=1e-5)
    assert abs(paired.bias) < 1e-5
    apart = frechet_interval(a, shifted, num_resamples=10)
    assert apart.high - apart.low > 0.1


def test_interval_is_not_negative_and_wider_for_more_confidence():
    a, b = laws(np.random.default_rng(10), 12, shift=0.0)
    wide, narrow = (frechet_interval(a, b, confidence=level) for level in (0.9999, 0.5))
    assert 0 <= wide.low < narrow.low < narrow.distance < narrow.high < wide.high
    few = frechet_interval(a, b[:3], num_resamples=5)
    assert np.all(np.isfinite(few))


def test_bad_interval_arguments():
    x = np.zeros((4, 3))
    for arguments, options, name in (
        ((x[0], x), {}, "features_a has shape"),
        ((x, x[:1]), {}, "features_b has shape"),
        ((x, x[:, :0]), {}, "features_b has shape"),
        ((x, x[:, :2]), {}, "must agree"),
        ((x, np.full_like(x, np.inf)), {}, "features_b must be finite"),
        ((x, x[:3]), {"paired": True}, "equally many"),
        ((x, x), {"confidence": 95.0}, "confidence"),
        ((x, x), {"num_resamples": 1}, "num_resamples"),
    ):
        with pytest.raises(ValueError, match=name):
            frechet_interval(*arguments, **options)
