"""Tests of the bootstrap interval."""

import numpy as np
import pytest

from megjax.metrics import bootstrap_interval

RESAMPLES = 2000
# A 2.5 % quantile q of R resamples has standard error sqrt(p (1 - p) / R) / density; 4 of them is the tolerance.
TOLERANCE = 4 * np.sqrt(0.025 * 0.975 / RESAMPLES) / (np.exp(-(1.96**2) / 2) / np.sqrt(2 * np.pi))


def test_matches_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    standard_error = values.std() / np.sqrt(values.size)
    low, high = bootstrap_interval(values, num_resamples=RESAMPLES)
    assert abs(low - (values.mean() - 1.96 * standard_error)) < TOLERANCE * standard_error
    assert abs(high - (values.mean() + 1.96 * standard_error)) < TOLERANCE * standard_error


def test_covers_the_true_mean_as_often_as_stated():
    rng = np.random.default_rng(1)
    trials = 200
    intervals = [bootstrap_interval(rng.normal(size=60), 0.8, 200, seed) for seed in range(trials)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    # The percentile interval uses the population variance: at n = 60 its true coverage is 0.79.
    assert abs(covered - 0.79) <= 4 * np.sqrt(0.8 * 0.2 / trials)


def test_resamples_images_not_realisations():
    per_image = np.arange(8.0)
    repeated = np.repeat(per_image[:, np.newaxis], 100, axis=1)
    assert bootstrap_interval(repeated) == pytest.approx(bootstrap_interval(per_image))


def test_is_reproducible_and_degenerate_for_constants():
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    assert bootstrap_interval(np.full(5, 0.5)) == (0.5, 0.5)


def test_bad_arguments():
    for arguments, name in (
        ({"values": np.zeros(0)}, "values"),
        ({"values": np.zeros(3), "confidence": 95.0}, "confidence"),
        ({"values": np.zeros(3), "num_resamples": 0}, "num_resamples"),
        ({"values": np.array([1.0, np.nan])}, "values hold NaN or infinities of both signs"),
        ({"values": np.array([np.inf, -np.inf])}, "values hold NaN or infinities of both signs"),
        ({"values": np.zeros(3), "weights": np.array([1.0, np.inf, 1.0])}, "weights"),
    ):
        with pytest.raises(ValueError, match=name):
            bootstrap_interval(**arguments)


def test_weights_give_the_interval_of_a_ratio():
    rng = np.random.default_rng(3)
    stated = rng.integers(6, 13, 500)
    share = rng.binomial(stated, 0.9) / stated
    low, high = bootstrap_interval(share, num_resamples=RESAMPLES, weights=stated)
    # Linearised (delta method) standard error of a ratio of sums.
    ratio = np.sum(stated * share) / stated.sum()
    standard_error = np.sqrt(np.sum((stated * (share - ratio)) ** 2)) / stated.sum()
    assert abs(low - (ratio - 1.96 * standard_error)) < TOLERANCE * standard_error
    assert abs(high - (ratio + 1.96 * standard_error)) < TOLERANCE * standard_error
    with pytest.raises(ValueError, match="weights has shape"):
        bootstrap_interval(share, weights=stated[1:])


def test_one_image_has_no_interval():
    assert np.isnan(bootstrap_interval(np.array([3.0]))).all()
    assert np.isnan(bootstrap_interval(np.ones((1, 5)))).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_values(sign):
    """One of four images is infinite: a resample is finite with probability (3/4)^4 = 0.32."""
    values = sign * np.array([np.inf, 1.0, 2.0, 3.0])
    low, high = sorted(np.multiply(sign, bootstrap_interval(values)))
    assert 1 <= low <= 1.5 and high == np.inf
    # Within the finite part, 20 to 30 % of all resamples, both ends are finite.
    assert np.isfinite(sign * bootstrap_interval(values, 0.95)[0 if sign > 0 else 1])
    assert bootstrap_interval(np.full(3, sign * np.inf)) == (sign * np.inf, sign * np.inf)
