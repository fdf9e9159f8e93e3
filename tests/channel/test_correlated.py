"""Tests of the time-correlated fading laws against their autocorrelation, distribution and joint moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from megjax.channel.fading import GaussMarkovFading, JakesFading, RayleighFading
from megjax.channel.random import uniform
from tests.channel.draws import draw, realisations
from tests.checks import NUM_DISTRIBUTION, STANDARD_ERRORS, check_distribution, within_standard_error

NUM = 2**14


@functools.cache
def jakes(doppler, num_paths):
    """Realisations of 40 blocks."""
    return realisations(JakesFading(doppler, num_paths), 2, NUM, 40)


@pytest.fixture(scope="module")
def gauss_markov():
    """Realisations of 12 blocks, by rho."""
    return {rho: realisations(GaussMarkovFading(rho), 8, NUM, 12) for rho in (-0.7, 0.0, 0.5, 0.8, 0.95)}


def excess_correlation(x, num_paths):
    """Var rho_M at x = 2 pi doppler k, its mean over each sector by the midpoint rule."""
    points = (np.arange(num_paths)[:, None] + (np.arange(2000) + 0.5) / 2000) * np.pi / num_paths
    means = np.exp(1j * x * np.cos(points)).mean(axis=1)
    return (1 - np.mean(np.abs(means) ** 2)) / num_paths


@pytest.mark.parametrize("fading", [GaussMarkovFading(-0.6), pytest.param(JakesFading(0.2, 8), marks=pytest.mark.slow)])
def test_every_block_is_complex_gaussian(fading):
    # One block of each realisation, so that the samples are independent.
    gains = realisations(fading, 1, NUM_DISTRIBUTION, 2)[:, 1]
    check_distribution(np.abs(gains), scipy.stats.rayleigh(scale=np.sqrt(0.5)).cdf)
    for part in (gains.real, gains.imag):
        check_distribution(part, scipy.stats.norm(scale=np.sqrt(0.5)).cdf)
    within_standard_error(np.abs(gains) ** 2, 1.0)
    within_standard_error(np.abs(gains) ** 4, 2.0)
    within_standard_error((gains**2).real, 0.0)
    within_standard_error((gains**2).imag, 0.0)


@pytest.mark.parametrize(
    ("doppler", "num_paths"),
    [
        (0.3, 32),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.01, 32), (0.05, 32), (0.9, 32), (0.1, 3))),
    ],
)
def test_jakes_autocorrelation_is_j0(doppler, num_paths):
    gains = jakes(doppler, num_paths)
    for first, lag in ((0, 1), (3, 2), (0, 5), (7, 17), (0, 39)):
        product = gains[:, first + lag] * gains[:, first].conj()
        within_standard_error(product.real, scipy.special.j0(2 * np.pi * doppler * lag))
        within_standard_error(product.imag, 0.0)
        pseudo = gains[:, first + lag] * gains[:, first]
        within_standard_error(pseudo.real, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("doppler", "num_paths", "lag"), [(0.05, 3, 15), (0.3, 3, 11), (0.8, 3, 1), (0.05, 32, 39)])
def test_jakes_joint_fourth_moment(doppler, num_paths, lag):
    gains = jakes(doppler, num_paths)
    x = 2 * np.pi * doppler * lag
    excess, j0 = excess_correlation(x, num_paths), scipy.special.j0(x)
    power = np.abs(gains) ** 2
    within_standard_error(power[:, 0] * power[:, lag], 1 + j0**2 + excess)
    # E|h_0 + h_k|^4 exceeds 2 (E|h_0 + h_k|^2)^2 by 2 Var(c^H R_M c) = 2 Var(2 Re rho_M(k)), at most 8 Var rho_M.
    summed = np.abs(gains[:, 0] + gains[:, lag])
    within_standard_error(summed**2, 2 + 2 * j0)
    mean, error = np.mean(summed**4), np.std(summed**4) / np.sqrt(NUM)
    gaussian = 2 * (2 + 2 * j0) ** 2
    assert gaussian - STANDARD_ERRORS * error <= mean <= gaussian + 8 * excess + STANDARD_ERRORS * error


def test_stated_bounds_of_the_excess():
    for num_paths in (1, 4, 32):
        for x in (0.1, 1.0, 5.0, 20.0, 300.0):
            excess = excess_correlation(x, num_paths)
            assert excess <= (1 - scipy.special.j0(x) ** 2) / num_paths * (1 + 1e-9)
            assert excess <= x**2 / (2 * num_paths**3)
    np.testing.assert_allclose(excess_correlation(1.0, 64), np.pi**2 / 24 / 64**3, rtol=1e-2)
    # What the default number of paths is chosen for: 16 blocks at Doppler 0.05.
    assert excess_correlation(2 * np.pi * 0.05 * 15, JakesFading(0.05).num_paths) < 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("doppler", [0.0137, 0.31, 1.2345, 7.5])
def test_jakes_phase_accuracy_of_long_sequences(doppler):
    # With one path the gains only turn: phases against float64 arithmetic on the same Doppler shift.
    num_blocks = 100_000
    gains = np.asarray(draw(JakesFading(doppler, 1), 4, num_blocks))
    angle_key, _ = jax.random.split(jax.random.key(4))
    angle = np.float32(np.pi) * uniform(angle_key, (1,))
    turns = np.asarray(jnp.float32(doppler) * jnp.cos(angle), np.float64)
    steps = np.arange(num_blocks)
    error = np.abs(gains / gains[0] - np.exp(2j * np.pi * turns * steps))
    rounding = 1e-6  # of float32 products and sines of order 1
    assert np.all(error <= 2 * np.pi * 2.0**-31 * steps + rounding)


def test_jakes_hand_computed_values():
    # Without motion all blocks have one gain; a shorter sequence of the same key is the start of a longer one.
    still = draw(JakesFading(0.0), 5, 7)
    np.testing.assert_allclose(still, np.full(7, still[0]), rtol=1e-6)
    long, short = (draw(JakesFading(0.4), 6, num_blocks) for num_blocks in (101, 7))
    np.testing.assert_allclose(long[:7], short, atol=1e-5)


@pytest.mark.slow
def test_jakes_derivatives_agree_with_the_sum_of_paths():
    fading, num_blocks = JakesFading(0.23, 3), 6
    angle_key, _ = jax.random.split(jax.random.key(7))
    angles = np.pi / 3 * (np.arange(3) + np.asarray(uniform(angle_key, (3,)), np.float64))
    shifts = 2j * np.pi * np.outer(np.arange(num_blocks), np.cos(angles))
    gains = np.asarray(draw(fading, 7, num_blocks), np.complex128)
    paths = np.linalg.lstsq(np.exp(0.23 * shifts), gains)[0]

    def parts(doppler):
        gains = JakesFading(doppler, 3).sample(jax.random.key(7), num_blocks)
        return jnp.stack([gains.real, gains.imag])

    first = shifts * np.exp(0.23 * shifts) @ paths
    second = shifts**2 * np.exp(0.23 * shifts) @ paths
    derivatives = jax.jit(lambda doppler: jax.jvp(lambda f: jax.jvp(parts, (f,), (1.0,))[1], (doppler,), (1.0,)))
    for derivative, exact in zip(derivatives(0.23), (first, second), strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(derivative, np.stack([exact.real, exact.imag]), atol=1e-4 * scale)


@pytest.mark.parametrize("rho", [-0.7, 0.0, 0.5, 0.95])
def test_gauss_markov_autocorrelation(gauss_markov, rho):
    gains = gauss_markov[rho]
    within_standard_error(np.abs(gains[:, 11]) ** 2, 1.0)
    power = np.abs(gains) ** 2
    for first, lag in ((0, 1), (4, 1), (2, 3), (0, 11)):
        product = gains[:, first + lag] * gains[:, first].conj()
        within_standard_error(product.real, rho**lag)
        within_standard_error(product.imag, 0.0)
        within_standard_error(power[:, first] * power[:, first + lag], 1 + rho ** (2 * lag))


def test_gauss_markov_is_markov(gauss_markov):
    rho = 0.8
    gains = gauss_markov[rho]
    innovation = gains[:, 2] - rho * gains[:, 1]
    within_standard_error(np.abs(innovation) ** 2, 1 - rho**2)
    for past in (gains[:, 0], gains[:, 1]):
        within_standard_error((innovation * past.conj()).real, 0.0)
        within_standard_error((np.abs(innovation) ** 2 - (1 - rho**2)) * (np.abs(past) ** 2 - 1), 0.0)


def test_gauss_markov_hand_computed_values():
    noise = draw(RayleighFading(), 10, 4)
    np.testing.assert_array_equal(draw(GaussMarkovFading(0.0), 10, 4), noise)
    np.testing.assert_array_equal(draw(GaussMarkovFading(1.0), 10, 4), np.full(4, noise[0]))
    sign = np.array([1, -1, 1, -1], np.float32)
    np.testing.assert_array_equal(draw(GaussMarkovFading(-1), 10, 4), noise[0] * sign)
    # rho = 0.6: h_2 = 0.6 w_1 + 0.8 w_2
    second = draw(GaussMarkovFading(0.6), 10, 4)[1]
    np.testing.assert_allclose(second, 0.6 * noise[0] + 0.8 * noise[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "value", "slope"),
    [
        # d/dx J0 = -J1 at lag 3
        (JakesFading, 0.1, lambda f: -6 * np.pi * scipy.special.j1(6 * np.pi * f)),
        (GaussMarkovFading, 0.7, lambda rho: 3 * rho**2),
    ],
)
def test_gradient_of_the_autocorrelation(law, value, slope):
    def correlation(value, key):
        gains = law(value).sample(key, 5)
        return (gains[4] * gains[1].conj()).real

    keys = jax.random.split(jax.random.key(14), 2**14)
    within_standard_error(jax.jit(jax.vmap(jax.grad(correlation), (None, 0)))(value, keys), slope(value))


def test_bad_arguments():
    for bad in (-0.1, np.inf, np.nan, np.array([0.1, -0.1])):
        with pytest.raises(ValueError, match="doppler is .*0 or more"):
            JakesFading(bad)
    for bad in (0, -2, True):
        with pytest.raises(ValueError, match="num_paths is .*integer of at least 1"):
            JakesFading(0.1, bad)
    for bad in (1.001, -1.001, np.nan):
        with pytest.raises(ValueError, match="rho is .*from -1 to 1"):
            GaussMarkovFading(bad)
    for fading in (JakesFading(np.ones(2)), GaussMarkovFading(np.ones(2))):
        with pytest.raises(ValueError, match="has shape"):
            fading.sample(jax.random.key(0), 3)
