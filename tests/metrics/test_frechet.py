"""Tests of the Frechet distance against closed forms and SciPy's matrix square root."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from megjax.metrics import feature_statistics, frechet_distance


def random_statistics(seed, size=16, rank=64):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, rank)) / np.sqrt(rank)
    return rng.normal(size=size), root @ root.T


def test_matches_the_matrix_square_root():
    (mean1, cov1), (mean2, cov2) = random_statistics(0), random_statistics(1)
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2)))
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(mean2, cov2, mean1, cov1), expected, rtol=1e-9)


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
