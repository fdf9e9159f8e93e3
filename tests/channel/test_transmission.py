"""Tests of transmission, LMMSE and zero-forcing equalisation against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import units
from megjax.channel.fading import RayleighFading
from megjax.channel.transmission import (
    equalize_lmmse,
    equalize_zf,
    lmmse_error_var,
    post_equalisation_snr,
    transmit,
    zf_error_var,
)

NUM_SYMBOLS = 20_000
FOUR_SIGMA = 4.0
GAINS = jnp.array([1.0, 0.3 - 0.8j, 0.1j], jnp.complex64)
POWER = jnp.array([1.0, 1.7, 0.3])
TRANSMIT = jax.jit(transmit)


def random_symbols(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.complex64)


def mean_and_error(samples):
    samples = np.asarray(samples, np.float64)
    return samples.mean(axis=-1), samples.std(axis=-1, ddof=1) / np.sqrt(samples.shape[-1])


def test_noise_is_absolute_and_circular():
    noise_var = 0.25
    symbols = random_symbols(0, (3, NUM_SYMBOLS))
    received = TRANSMIT(jax.random.key(1), symbols, GAINS, POWER, noise_var)
    assert received.shape == symbols.shape and received.dtype == jnp.complex64
    noise = np.asarray(received - (jnp.sqrt(POWER) * GAINS)[:, None] * symbols)
    for samples, expected in ((np.abs(noise) ** 2, noise_var), (noise.real, 0.0), (noise.real * noise.imag, 0.0)):
        mean, error = mean_and_error(samples)
        assert np.all(np.abs(mean - expected) <= FOUR_SIGMA * error)


def test_received_power_follows_transmit_power_and_gain():
    received = TRANSMIT(jax.random.key(2), random_symbols(3, (3, NUM_SYMBOLS)), GAINS, POWER, 0.1)
    mean, error = mean_and_error(np.abs(np.asarray(received)) ** 2)
    expected = np.asarray(POWER) * np.abs(np.asarray(GAINS)) ** 2 + 0.1
    assert np.all(np.abs(mean - expected) <= FOUR_SIGMA * error)


def test_twice_the_power_is_3_db_more():
    def measured_snr(power):
        symbols = random_symbols(4, (3, NUM_SYMBOLS))
        received = TRANSMIT(jax.random.key(5), symbols, GAINS, power, 0.5)
        clean = (jnp.sqrt(power) * GAINS)[:, None] * symbols
        return jnp.mean(jnp.abs(clean) ** 2, axis=1) / jnp.mean(jnp.abs(received - clean) ** 2, axis=1)

    # Same symbols and noise in both: the ratio is exact up to rounding (float32 cancellation in received - clean).
    gain_db = units.linear_to_db(measured_snr(2 * POWER) / measured_snr(POWER))
    np.testing.assert_allclose(gain_db, 10 * np.log10(2), atol=1e-3)
    once_db, twice_db = (units.linear_to_db(post_equalisation_snr(GAINS, p, 0.5)) for p in (POWER, 2 * POWER))
    np.testing.assert_allclose(twice_db - once_db, 10 * np.log10(2), atol=1e-4)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 12.0])
def test_lmmse_error_variance(snr_db):
    noise_var = units.noise_var_from_snr_db(snr_db)
    symbols = random_symbols(6, (3, NUM_SYMBOLS))
    received = TRANSMIT(jax.random.key(7), symbols, GAINS, POWER, noise_var)
    estimate = equalize_lmmse(received, GAINS, POWER, noise_var)
    mean, error = mean_and_error(np.abs(np.asarray(estimate - symbols)) ** 2)
    expected = 1 / (1 + np.asarray(post_equalisation_snr(GAINS, POWER, noise_var)))
    assert np.all(np.abs(mean - expected) <= FOUR_SIGMA * error)
    # Orthogonality of error and observation characterises the LMMSE estimate.
    mean, error = mean_and_error(((estimate - symbols) * received.conj()).real)
    assert np.all(np.abs(mean) <= FOUR_SIGMA * error)


def test_hand_computed_value():
    # sqrt(4) conj(1j) (2 + 2j) / (4 + 1) = 2 (-1j) (2 + 2j) / 5 = (4 - 4j) / 5
    estimate = equalize_lmmse(jnp.array([[2 + 2j]]), jnp.array([1j]), jnp.array([4.0]), 1.0)
    np.testing.assert_allclose(estimate, [[0.8 - 0.8j]], rtol=1e-6)
    np.testing.assert_allclose(post_equalisation_snr(jnp.array([1j]), jnp.array([4.0]), 0.5), [8.0])


def test_vmap_and_jit_agree_with_the_loop():
    def link(key, noise_var):
        fading_key, noise_key, symbol_key = jax.random.split(key, 3)
        gains = RayleighFading().sample(fading_key, 3)
        symbols = jax.random.normal(symbol_key, (3, 5), jnp.complex64)
        return equalize_lmmse(TRANSMIT(noise_key, symbols, gains, POWER, noise_var), gains, POWER, noise_var)

    noise_vars = jnp.array([0.1, 1.0, 10.0])
    mapped = jax.jit(jax.vmap(link))(jax.random.split(jax.random.key(8), 3), noise_vars)
    compiled = jax.jit(link)
    loop = [compiled(key, var) for key, var in zip(jax.random.split(jax.random.key(8), 3), noise_vars, strict=True)]
    np.testing.assert_allclose(mapped, np.stack(loop), rtol=1e-4, atol=1e-6)


def test_gradients_are_finite_and_nonzero():
    symbols = random_symbols(9, (3, 8))

    def error(power, scale, noise_var):
        received = TRANSMIT(jax.random.key(10), scale * symbols, GAINS, power, noise_var)
        return jnp.mean(jnp.abs(equalize_lmmse(received, GAINS, power, noise_var) - symbols) ** 2)

    for gradient in jax.jit(jax.grad(error, argnums=(0, 1, 2)))(POWER, 1.0, 0.3):
        assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient) != 0)


def test_silent_block_gives_zeros_and_finite_gradients():
    power = jnp.array([1.0, 0.0, 2.0])
    symbols = random_symbols(11, (3, 8))

    def received_energy(power):
        received = TRANSMIT(jax.random.key(12), symbols, GAINS, power, 0.3)
        return jnp.sum(jnp.abs(equalize_lmmse(received, GAINS, power, 0.3)) ** 2)

    estimate = equalize_lmmse(symbols, GAINS, power, 0.3)
    np.testing.assert_array_equal(estimate[1], np.zeros(8))
    assert np.all(np.isfinite(jax.jit(jax.grad(received_energy))(power)))


def test_mismatched_shapes_are_rejected():
    with pytest.raises(Exception, match="gains|dimension"):
        transmit(jax.random.key(0), random_symbols(13, (4, 2)), GAINS, POWER, 1.0)


def test_zero_forcing_is_unbiased_with_the_stated_error():
    noise_var = 0.4
    symbols = random_symbols(14, (3, NUM_SYMBOLS))
    received = TRANSMIT(jax.random.key(15), symbols, GAINS, POWER, noise_var)
    estimate = equalize_zf(received, GAINS, POWER)
    assert estimate.shape == symbols.shape and estimate.dtype == jnp.complex64
    error = np.asarray(estimate - symbols)
    mean, spread = mean_and_error(np.abs(error) ** 2)
    assert np.all(np.abs(mean - zf_error_var(GAINS, POWER, noise_var)) <= FOUR_SIGMA * spread)
    mean, spread = mean_and_error((error * np.asarray(symbols).conj()).real)
    assert np.all(np.abs(mean) <= FOUR_SIGMA * spread)
    snr = post_equalisation_snr(GAINS, POWER, noise_var)
    lmmse = equalize_lmmse(received, GAINS, POWER, noise_var)
    np.testing.assert_allclose(lmmse * ((1 + snr) / snr)[:, None], estimate, rtol=1e-5, atol=1e-5)


def test_hand_computed_zero_forcing():
    # (2 + 2j) / (sqrt(4) 1j) = 1 - 1j; gamma = 4 / 0.5
    gains, power = jnp.array([1j]), jnp.array([4.0])
    np.testing.assert_allclose(equalize_zf(jnp.array([[2 + 2j]]), gains, power), [[1 - 1j]], rtol=1e-6)
    np.testing.assert_allclose(zf_error_var(gains, power, 0.5), [1 / 8], rtol=1e-6)
    np.testing.assert_allclose(lmmse_error_var(gains, power, 0.5), [1 / 9], rtol=1e-6)


def test_zero_forcing_of_blocks_without_power_or_gain():
    power, gains = jnp.array([1.0, 0.0, 2.0]), jnp.array([1.0, 0.5, 0.0], jnp.complex64)
    received = random_symbols(16, (3, 8))

    def summary(gains, power):
        estimate = equalize_zf(received, gains, power)
        return jnp.sum(jnp.abs(estimate) ** 2) + jnp.sum(zf_error_var(gains, power, 0.3))

    np.testing.assert_array_equal(equalize_zf(received, gains, power)[1:], np.zeros((2, 8)))
    np.testing.assert_allclose(zf_error_var(gains, power, 0.3), [0.3, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(lmmse_error_var(gains, power, 0.3), [0.3 / 1.3, 1, 1], rtol=1e-6)
    for gradient in jax.jit(jax.grad(summary, argnums=(0, 1)))(gains, power):
        assert np.all(np.isfinite(gradient)) and gradient[0] != 0


def test_noise_variance_per_block():
    noise_vars = jnp.array([0.1, 0.5, 2.0])
    received = random_symbols(17, (3, 4))
    for i in range(3):
        one = (GAINS[i : i + 1], POWER[i : i + 1])
        row = equalize_lmmse(received[i : i + 1], *one, noise_vars[i])
        np.testing.assert_allclose(equalize_lmmse(received, GAINS, POWER, noise_vars)[i], row[0], rtol=1e-6)
        for function in (post_equalisation_snr, lmmse_error_var, zf_error_var):
            np.testing.assert_allclose(function(GAINS, POWER, noise_vars)[i], function(*one, noise_vars[i])[0], 1e-6)


def test_receiver_with_estimated_gains():
    """Gains known up to an error of variance e: the LMMSE receiver counts power * e as noise."""
    error_var, noise_var, power = 0.2, 0.3, jnp.full(NUM_SYMBOLS, 1.5)
    known_key, error_key, noise_key, symbol_key = jax.random.split(jax.random.key(18), 4)
    known = jnp.sqrt(1 - error_var) * jax.random.normal(known_key, (NUM_SYMBOLS,), jnp.complex64)
    gains = known + jnp.sqrt(error_var) * jax.random.normal(error_key, (NUM_SYMBOLS,), jnp.complex64)
    symbols = jax.random.normal(symbol_key, (NUM_SYMBOLS, 1), jnp.complex64)
    received = TRANSMIT(noise_key, symbols, gains, power, noise_var)
    effective = noise_var + power * error_var
    errors = np.abs(np.asarray(equalize_lmmse(received, known, power, effective) - symbols)[:, 0]) ** 2
    mean, spread = mean_and_error(errors - np.asarray(lmmse_error_var(known, power, effective)))
    assert abs(mean) <= FOUR_SIGMA * spread


def test_zero_forcing_under_vmap_and_jit_agrees_with_the_loop():
    batch = random_symbols(19, (4, 3, 5))
    mapped = jax.jit(jax.vmap(lambda received: equalize_zf(received, GAINS, POWER)))(batch)
    loop = np.stack([equalize_zf(received, GAINS, POWER) for received in batch])
    np.testing.assert_allclose(mapped, loop, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_powers_and_noise(bad):
    symbols = random_symbols(14, (3, 2))
    with pytest.raises(ValueError, match="^power is .*; it must be finite and 0 or more$"):
        transmit(jax.random.key(0), symbols, GAINS, POWER.at[1].set(bad), 1.0)
    with pytest.raises(ValueError, match="^noise_var is .*; it must be finite and 0 or more$"):
        transmit(jax.random.key(0), symbols, GAINS, POWER, bad)
    for call in (
        lambda var: equalize_lmmse(symbols, GAINS, POWER, var),
        lambda var: post_equalisation_snr(GAINS, POWER, var),
    ):
        for value in (bad, 0.0):
            with pytest.raises(ValueError, match="^noise_var is .*; it must be finite and more than 0$"):
                call(value)
