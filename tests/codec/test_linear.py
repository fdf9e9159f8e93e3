"""Tests of the linear schemes against float64 Gaussian conditional means, closed forms and simulation."""

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

FOUR_SIGMA = 4.0
EPS = 6e-8
SHAPE = (4, 3, 2)
SIZE = 24
MEAN, STD = jnp.array([0.3, -0.2]), jnp.array([1.5, 0.6])
WIENER = jax.jit(wiener_decode, static_argnums=5)
KLT_DECODE = jax.jit(klt_decode, static_argnums=3)


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
    """What the link hands over for values received at `snr` with noise of unit variance: NumPy, float64."""
    return (snr * values + np.sqrt(snr) * noise) / (1 + snr)


def test_statistics():
    latents, _, _ = gaussian_latents(500)
    statistics = latent_statistics(latents)
    flat = latents.reshape(500, SIZE)
    assert all(array.dtype == jnp.float32 for array in statistics)
    np.testing.assert_allclose(statistics.mean, flat.mean(0), rtol=1e-5, atol=1e-6)
    covariance = np.cov(flat, rowvar=False, ddof=0)
    np.testing.assert_allclose(
        statistics.basis * statistics.variances[None] @ statistics.basis.T, covariance, atol=1e-5
    )
    np.testing.assert_allclose(statistics.basis.T @ statistics.basis, np.eye(SIZE), atol=1e-5)
    assert np.all(np.diff(statistics.variances) <= 0)
    np.testing.assert_allclose(statistics.total_variance, np.trace(covariance), rtol=1e-5)


def test_statistics_of_fewer_latents_than_values_are_floored():
    statistics = latent_statistics(gaussian_latents(5)[0])
    np.testing.assert_allclose(statistics.variances[4:], VARIANCE_FLOOR * statistics.variances[0], rtol=1e-5)


def test_klt_values_are_white_and_come_back():
    latents = gaussian_latents(300)[0]
    statistics, latents = latent_statistics(latents), jnp.asarray(latents, jnp.float32)
    values = jax.jit(jax.vmap(lambda z: klt_encode(statistics, z)))(latents)
    # Rounding of latents of some size 3, against the smallest standard deviation, 0.2.
    np.testing.assert_allclose(np.cov(values, rowvar=False, ddof=0), np.eye(SIZE), atol=1e-4)
    np.testing.assert_allclose(values[7], klt_encode(statistics, latents[7]), rtol=1e-4, atol=1e-5)
    snr = jnp.full(SIZE, jnp.inf)
    np.testing.assert_allclose(KLT_DECODE(statistics, values[0], snr, SHAPE), latents[0], atol=1e-5)
    # Values that were not sent count as their mean: the error is the projection on the other eigenvectors.
    short = KLT_DECODE(statistics, values[0, :10], snr[:10], SHAPE)
    lost = np.asarray(statistics.basis[:, 10:].T @ (latents[0] - short).reshape(-1))
    np.testing.assert_allclose(lost, values[0, 10:] * np.sqrt(statistics.variances[10:]), atol=1e-5)
    mean = klt_synthesis(statistics, jnp.zeros(4), SHAPE)
    np.testing.assert_allclose(mean.reshape(-1), statistics.mean, rtol=1e-6)


@pytest.mark.parametrize("num_values", [6, SIZE])
@pytest.mark.parametrize("fading", ["awgn", "rayleigh"])
def test_klt_error_on_gaussian_latents_is_the_analytic_one(fading, num_values):
    count, snr, rng = 4000, 2.0, np.random.default_rng(1)
    latents, mean, covariance = gaussian_latents(count)
    statistics = statistics_of(mean, covariance)
    mean_error = mean_lmmse_error_awgn if fading == "awgn" else mean_lmmse_error_rayleigh
    load = jax.jit(lambda snr: klt_load(statistics, num_values, snr, mean_error))(snr)
    np.testing.assert_allclose(np.mean(load), 1, rtol=1e-6)
    gains = np.ones((count, num_values)) if fading == "awgn" else rng.exponential(size=(count, num_values))
    values = jax.vmap(lambda z: klt_encode(statistics, z))(jnp.asarray(latents, jnp.float32))[:, :num_values]
    value_snr = np.asarray(load) * snr * gains
    estimate = link(np.asarray(values, np.float64), value_snr, rng.normal(size=values.shape))
    decode = jax.vmap(lambda x, s: KLT_DECODE(statistics, x, s, SHAPE))
    decoded = decode(jnp.asarray(estimate, jnp.float32), jnp.asarray(value_snr, jnp.float32))
    errors = np.sum((np.asarray(decoded, np.float64) - latents) ** 2, axis=(1, 2, 3)) / np.trace(covariance)
    expected = klt_nmse(statistics, load, snr, mean_error)
    assert abs(errors.mean() - expected) <= FOUR_SIGMA * errors.std() / np.sqrt(count)


def test_klt_load_beats_equal_loads():
    statistics = statistics_of(np.zeros(SIZE), gaussian_latents(1)[2])

    @jax.jit
    def errors(snr):
        load = klt_load(statistics, 12, snr, mean_lmmse_error_awgn)
        return [klt_nmse(statistics, choice, snr, mean_lmmse_error_awgn) for choice in (load, jnp.ones(12))]

    for snr in (0.1, 1.0, 10.0):
        loaded, equal = errors(snr)
        assert loaded < equal


def test_raw_values():
    latent = jnp.arange(float(SIZE)).reshape(SHAPE)
    values = raw_encode(MEAN, STD, latent)
    np.testing.assert_allclose(values[:3], [(0 - 0.3) / 1.5, (1 + 0.2) / 0.6, (2 - 0.3) / 1.5], rtol=1e-6)
    np.testing.assert_allclose(raw_decode(MEAN, STD, values, jnp.ones(SIZE), SHAPE), latent, atol=1e-5)
    short = raw_decode(MEAN, STD, values[:5], jnp.ones(5), SHAPE).reshape(-1)
    np.testing.assert_allclose(short[:5], latent.reshape(-1)[:5], atol=1e-5)
    np.testing.assert_allclose(short[5:7], [-0.2, 0.3], rtol=1e-6)


def conditional_mean(mean, covariance, std, values, snr, noise):
    """Brute force, float64: the Gaussian mean of z given y = x + noise / sqrt(snr) wherever snr > 0."""
    seen = np.flatnonzero(snr > 0)
    observed = values[seen] + noise[seen] / np.sqrt(snr[seen])
    rows = np.eye(len(mean))[seen] / std[seen, None]
    prior = rows @ (mean - np.tile(np.asarray(MEAN, np.float64), SIZE // 2))
    total = rows @ covariance @ rows.T + np.diag(1 / snr[seen])
    return mean + covariance @ rows.T @ np.linalg.solve(total, observed - prior)


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 20.0, 40.0])
@pytest.mark.parametrize("count", [SIZE, 15])
def test_wiener_receiver_is_the_conditional_mean(snr_db, count):
    rng = np.random.default_rng(2)
    latents, mean, covariance = gaussian_latents(4, decades=3.0)
    std = np.tile(np.asarray(STD, np.float64), SIZE // 2)
    snr = 10 ** (snr_db / 10) * rng.exponential(size=(4, count)) * (rng.uniform(size=(4, count)) > 0.2)
    noise = rng.normal(size=(4, count))
    values = (latents.reshape(4, SIZE) - np.tile(np.asarray(MEAN, np.float64), SIZE // 2)) / std
    estimate = link(values[:, :count], snr, noise)
    decode = jax.jit(jax.vmap(lambda x, s: wiener_decode(statistics, MEAN, STD, x, s, SHAPE)))
    statistics = statistics_of(mean, covariance)
    decoded = decode(jnp.asarray(estimate, jnp.float32), jnp.asarray(snr, jnp.float32))
    for i in range(4):
        expected = conditional_mean(mean, covariance, std, values[i, :count], snr[i], noise[i])
        # Rounding of a matrix of norm snr v / std^2 reaches the estimate divided by the amplitude of the noise.
        rounding = 10 * EPS * (1 + np.sqrt(snr[i].max()) * 4 / 0.6**2)
        np.testing.assert_allclose(decoded[i].reshape(-1), expected, atol=rounding + 1e-5)


def test_wiener_receiver_without_correlation_is_symbol_by_symbol():
    rng = np.random.default_rng(3)
    variances = rng.uniform(0.1, 4, SIZE)
    std = np.tile(np.asarray(STD, np.float64), SIZE // 2)
    mean = np.tile(np.asarray(MEAN, np.float64), SIZE // 2)
    order = np.argsort(-variances)
    fields = mean, variances[order], np.eye(SIZE)[:, order]
    statistics = LatentStatistics(*(jnp.asarray(array, jnp.float32) for array in fields))
    snr = np.where(rng.uniform(size=SIZE) > 0.2, rng.exponential(3.0, size=SIZE), 0)
    estimate = rng.normal(size=SIZE) * (snr > 0)
    # A value of variance v at reliability a = snr / (1 + snr): its estimate times v / (a v + 1 - a).
    relative, reliability = variances / std**2, snr / (1 + snr)
    expected = mean + std * estimate * relative / (reliability * relative + 1 - reliability)
    arguments = jnp.asarray(estimate, jnp.float32), jnp.asarray(snr, jnp.float32)
    np.testing.assert_allclose(WIENER(statistics, MEAN, STD, *arguments, SHAPE).reshape(-1), expected, atol=1e-5)


def test_wiener_receiver_at_the_ends_of_the_snr():
    latents, mean, covariance = gaussian_latents(1, decades=1.0)
    statistics, latent = statistics_of(mean, covariance), jnp.asarray(latents[0], jnp.float32)
    nothing = WIENER(statistics, MEAN, STD, jnp.zeros(SIZE), jnp.zeros(SIZE), SHAPE)
    np.testing.assert_allclose(nothing.reshape(-1), mean, rtol=1e-6)
    snr = jnp.full(SIZE, 1e4)
    estimate = raw_encode(MEAN, STD, latent) * snr / (1 + snr)
    # Shrinkage of at most std^2 / (snr v), v >= 0.4, of a deviation below 10.
    error = WIENER(statistics, MEAN, STD, estimate, snr, SHAPE) - latent
    assert np.max(np.abs(error)) <= 10 * 1.5**2 / (1e4 * 0.4)
    for low in (1e-30, 1e-38, 1e-10):
        assert np.all(np.isfinite(WIENER(statistics, MEAN, STD, jnp.full(SIZE, low), jnp.full(SIZE, low), SHAPE)))


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
