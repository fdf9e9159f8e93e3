"""Tests of the linear schemes against float64 Gaussian conditional means, closed forms and simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec.linear import (
    VARIANCE_FLOOR,
    LatentStatistics,
    klt_decode,
    klt_encode,
    klt_load,
    klt_nmse,
    klt_synthesis,
    latent_statistics,
    raw_decode,
    raw_encode,
    wiener_decode,
)
from tests.checks import within_standard_error
from tests.products import inexact_products

EPS = 6e-8
SHAPE = (4, 3, 2)
SIZE = 24
COUNT = 4000  # latents in statistics
BATCH = 16  # latents in one call of the Wiener receiver
MEAN, STD = jnp.array([0.3, -0.2]), jnp.array([1.5, 0.6])
STDS, MEANS = (np.tile(np.asarray(x, np.float64), SIZE // 2) for x in (STD, MEAN))
KLT_ENCODE = jax.jit(jax.vmap(klt_encode, (None, 0)))


def gaussian_latents(count, decades=2.0, seed=0):
    """Gaussian latents [count 4 3 2], their mean and covariance, whose eigenvalues span some decades."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    variances = 4 * np.geomspace(1, 10**-decades, SIZE)
    mean = rng.normal(size=SIZE)
    values = mean + (rng.normal(size=(count, SIZE)) * np.sqrt(variances)) @ basis.T
    return values.reshape(count, *SHAPE), mean, basis * variances @ basis.T


def statistics_of(mean, covariance):
    variances, basis = np.linalg.eigh(covariance)
    return LatentStatistics(*(jnp.asarray(x, jnp.float32) for x in (mean, variances[::-1], basis[:, ::-1])))


def link(values, snr, noise):
    """What the link hands over for values received at `snr` with noise of unit variance."""
    return (snr * values + snr**0.5 * noise) / (1 + snr)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def wiener(statistics, estimate, snr):
    """Latents [b n] of the Wiener receiver."""
    return wiener_decode(statistics, MEAN, STD, estimate, snr, SHAPE).reshape(-1)


def test_statistics():
    latents, _, _ = gaussian_latents(500)
    statistics = latent_statistics(latents)
    assert all(array.dtype == jnp.float32 for array in statistics)
    mean, variances, basis = map(np.asarray, statistics)
    flat = latents.reshape(500, SIZE)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-5, atol=1e-6)
    covariance = np.cov(flat, rowvar=False, ddof=0)
    np.testing.assert_allclose(basis * variances @ basis.T, covariance, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(SIZE), atol=1e-5)
    assert np.all(np.diff(variances) <= 0)
    np.testing.assert_allclose(statistics.total_variance, np.trace(covariance), rtol=1e-5)


def test_statistics_of_fewer_latents_than_values_are_floored():
    variances = np.asarray(latent_statistics(gaussian_latents(5)[0]).variances)
    np.testing.assert_allclose(variances[4:], VARIANCE_FLOOR * variances[0], rtol=1e-5)


def test_klt_values_are_white_and_come_back():
    latents = gaussian_latents(COUNT)[0].astype(np.float32)
    statistics = latent_statistics(latents)
    values = np.asarray(KLT_ENCODE(statistics, latents))
    # Rounding of latents of some size 3, against the smallest standard deviation, 0.2.
    np.testing.assert_allclose(np.cov(values, rowvar=False, ddof=0), np.eye(SIZE), atol=1e-4)

    @jax.jit
    def one(latent, values):
        snr = jnp.full(SIZE, jnp.inf)
        whole = klt_decode(statistics, values, snr, SHAPE)
        short = klt_decode(statistics, values[:10], snr[:10], SHAPE)
        return klt_encode(statistics, latent), whole, short, klt_synthesis(statistics, jnp.zeros(4), SHAPE)

    encoded, whole, short, mean = map(np.asarray, one(latents[7], values[7]))
    np.testing.assert_allclose(values[7], encoded, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole, latents[7], atol=1e-5)
    # Values that were not sent count as their mean: the error is the projection on the other eigenvectors.
    basis, deviations = np.asarray(statistics.basis)[:, 10:], np.sqrt(statistics.variances)[10:]
    np.testing.assert_allclose(basis.T @ (latents[7] - short).reshape(-1), values[7, 10:] * deviations, atol=1e-5)
    np.testing.assert_allclose(mean.reshape(-1), statistics.mean, rtol=1e-6)


@pytest.mark.parametrize("num_values", [6, SIZE])
@pytest.mark.parametrize("fading", ["awgn", "rayleigh"])
def test_klt_error_on_gaussian_latents_is_the_analytic_one(fading, num_values):
    """The loads that give it are better than equal ones."""
    rng = np.random.default_rng(1)
    latents, mean, covariance = gaussian_latents(COUNT)
    statistics = statistics_of(mean, covariance)
    mean_error = mean_lmmse_error_awgn if fading == "awgn" else mean_lmmse_error_rayleigh

    @jax.jit
    def closed(snr):
        load = klt_load(statistics, num_values, snr, mean_error)
        return load, *(klt_nmse(statistics, choice, snr, mean_error) for choice in (load, jnp.ones(num_values)))

    @jax.jit
    def transmit(values, load, gains, noise):
        snr = load[None] * 2.0 * gains
        decode = jax.vmap(lambda x, s: klt_decode(statistics, x, s, SHAPE))
        return decode(link(values[:, :num_values], snr, noise), snr)

    load, expected, _ = closed(2.0)
    np.testing.assert_allclose(np.mean(load), 1, rtol=1e-6)
    for snr in (0.1, 1.0, 10.0):
        _, loaded, equal = closed(snr)
        assert loaded < equal
    gains = np.ones((COUNT, num_values)) if fading == "awgn" else rng.exponential(size=(COUNT, num_values))
    noise = rng.normal(size=(COUNT, num_values))
    values = KLT_ENCODE(statistics, latents.astype(np.float32))
    decoded = np.asarray(transmit(values, load, *(x.astype(np.float32) for x in (gains, noise))), np.float64)
    within_standard_error(np.sum((decoded - latents) ** 2, axis=(1, 2, 3)) / np.trace(covariance), expected)


def test_raw_values():
    latent = np.arange(SIZE, dtype=np.float32).reshape(SHAPE)

    @jax.jit
    def trip(latent):
        values, snr = raw_encode(MEAN, STD, latent), jnp.ones(SIZE)
        return values, *(raw_decode(MEAN, STD, values[:k], snr[:k], SHAPE) for k in (SIZE, 5))

    values, whole, short = trip(latent)
    np.testing.assert_allclose(values[:3], [(0 - 0.3) / 1.5, (1 + 0.2) / 0.6, (2 - 0.3) / 1.5], rtol=1e-6)
    np.testing.assert_allclose(whole, latent, atol=1e-5)
    short = np.asarray(short).reshape(-1)
    np.testing.assert_allclose(short[:5], latent.reshape(-1)[:5], atol=1e-5)
    np.testing.assert_allclose(short[5:7], [-0.2, 0.3], rtol=1e-6)


def conditional_mean(mean, covariance, std, values, snr, noise):
    """Brute force, float64: the Gaussian mean of z given y = x + noise / sqrt(snr) wherever snr > 0."""
    seen = np.flatnonzero(snr > 0)
    observed = values[seen] + noise[seen] / np.sqrt(snr[seen])
    rows = np.eye(len(mean))[seen] / std[seen, None]
    prior = rows @ (mean - MEANS)
    total = rows @ covariance @ rows.T + np.diag(1 / snr[seen])
    return mean + covariance @ rows.T @ np.linalg.solve(total, observed - prior)


@pytest.mark.parametrize("count", [SIZE, 15])
def test_wiener_receiver_is_the_conditional_mean(count):
    rng = np.random.default_rng(2)
    latents, mean, covariance = gaussian_latents(BATCH, decades=3.0)
    level = np.repeat(10.0 ** np.array([-2.0, 0.0, 2.0, 4.0]), BATCH // 4)[:, None]
    snr = level * rng.exponential(size=(BATCH, count)) * (rng.uniform(size=(BATCH, count)) > 0.2)
    noise = rng.normal(size=(BATCH, count))
    values = (latents.reshape(BATCH, SIZE) - MEANS) / STDS
    estimate = link(values[:, :count], snr, noise)
    decoded = wiener(statistics_of(mean, covariance), estimate.astype(np.float32), snr.astype(np.float32))
    for i in range(BATCH):
        expected = conditional_mean(mean, covariance, STDS, values[i, :count], snr[i], noise[i])
        # Rounding of a matrix of norm snr v / std^2 reaches the estimate divided by the amplitude of the noise.
        rounding = 10 * EPS * (1 + np.sqrt(snr[i].max()) * 4 / 0.6**2)
        np.testing.assert_allclose(decoded[i], expected, atol=rounding + 1e-5)


def test_wiener_receiver_without_correlation_is_symbol_by_symbol():
    rng = np.random.default_rng(3)
    variances = rng.uniform(0.1, 4, SIZE)
    order = np.argsort(-variances)
    fields = MEANS, variances[order], np.eye(SIZE)[:, order]
    statistics = LatentStatistics(*(jnp.asarray(array, jnp.float32) for array in fields))
    snr = np.where(rng.uniform(size=(BATCH, SIZE)) > 0.2, rng.exponential(3.0, size=(BATCH, SIZE)), 0)
    estimate = rng.normal(size=(BATCH, SIZE)) * (snr > 0)
    # A value of variance v at reliability a = snr / (1 + snr): its estimate times v / (a v + 1 - a).
    relative, reliability = variances / STDS**2, snr / (1 + snr)
    expected = MEANS + STDS * estimate * relative / (reliability * relative + 1 - reliability)
    decoded = wiener(statistics, estimate.astype(np.float32), snr.astype(np.float32))
    np.testing.assert_allclose(decoded, expected, atol=1e-5)


def test_wiener_receiver_at_the_ends_of_the_snr():
    latents, mean, covariance = gaussian_latents(1, decades=1.0)
    flat = latents.reshape(SIZE)
    # Nothing, hardly anything, and nearly the latent itself.
    level = np.array([0.0, *np.geomspace(1e-38, 1e-10, BATCH - 2), 1e4], np.float32)
    snr = np.broadcast_to(level[:, None], (BATCH, SIZE))
    estimate = np.where(level[:, None] > 1, (flat - MEANS) / STDS * snr / (1 + snr), snr)
    decoded = np.asarray(wiener(statistics_of(mean, covariance), estimate.astype(np.float32), snr))
    np.testing.assert_allclose(decoded[0], mean, rtol=1e-6)
    assert np.all(np.isfinite(decoded))
    # Shrinkage of at most std^2 / (snr v), v >= 0.4, of a deviation below 10.
    assert np.max(np.abs(decoded[-1] - flat)) <= 10 * 1.5**2 / (1e4 * 0.4)


def test_gradient_of_the_wiener_receiver_is_finite_without_signal():
    latents, mean, covariance = gaussian_latents(1)
    statistics = statistics_of(mean, covariance)
    snr = jnp.where(jnp.arange(SIZE) % 2 == 0, 0.0, 3.0)

    def norm(estimate, snr):
        return jnp.sum(jnp.square(wiener_decode(statistics, MEAN, STD, estimate, snr, SHAPE)))

    gradients = jax.jit(jax.grad(norm, argnums=(0, 1)))(jnp.where(snr > 0, 0.5, 0.0), snr)
    assert all(np.all(np.isfinite(gradient)) and np.any(gradient != 0) for gradient in gradients)


STATISTICS = statistics_of(np.zeros(SIZE), np.eye(SIZE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_statistics(np.zeros((5, 4))), r"latents' shape is \(5, 4\); it must be \[b h w c\]"),
        (lambda: latent_statistics(np.zeros((1, *SHAPE))), r"latents' shape is \(1, 4, 3, 2\).*b >= 2"),
        (lambda: latent_statistics(np.full((3, *SHAPE), np.nan)), "latents is '3 of 3 not finite'"),
        (lambda: latent_statistics(np.ones((3, *SHAPE))), "largest variance is 0.0; it must be positive"),
        (lambda: klt_encode(STATISTICS, jnp.zeros(5)), r"latent's shape is \(5,\); it must be one with 24 values"),
        (lambda: klt_load(STATISTICS, 0, 1.0, mean_lmmse_error_awgn), "num_values is 0; it must be between 1 and 24"),
        (lambda: klt_load(STATISTICS, 25, 1.0, mean_lmmse_error_awgn), "num_values is 25"),
        (lambda: klt_decode(STATISTICS, jnp.zeros(30), jnp.zeros(30), SHAPE), "number of values is 30; .* at most 24"),
        (lambda: klt_nmse(STATISTICS, jnp.ones(30), 1.0, mean_lmmse_error_awgn), "number of loads is 30"),
        (lambda: klt_decode(STATISTICS, jnp.zeros(4), jnp.zeros(4), (5, 5)), r"shape is \(5, 5\)"),
        (lambda: raw_decode(MEAN, STD, jnp.zeros(30), jnp.zeros(30), SHAPE), "estimate's shape is"),
        (lambda: wiener_decode(STATISTICS, MEAN, STD, jnp.zeros(30), jnp.zeros(30), SHAPE), "number of values is 30"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_products_are_exact():
    def both_ways(statistics, latent, snr):
        klt, raw = klt_encode(statistics, latent), raw_encode(MEAN, STD, latent)
        return klt_decode(statistics, klt, snr, SHAPE), wiener_decode(statistics, MEAN, STD, raw, snr, SHAPE)

    statistics = statistics_of(np.zeros(SIZE), np.eye(SIZE))
    assert inexact_products(both_ways, statistics, jnp.ones(SHAPE), jnp.ones(SIZE), gradient=True) == []
