"""Bit error rates of the whole link, bits to decisions, against the exact formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import units
from megjax.channel import theory
from megjax.channel.fading import NoFading, RayleighFading
from megjax.channel.modulation import MODULATIONS, bits_per_symbol, demodulate, modulate
from megjax.channel.transmission import equalize_lmmse, equalize_zf, transmit

FOUR_SIGMA = 4.0
POWER = 1.7
CHUNK, NUM_CHUNKS = 2**13, 2**7
# SNRs per symbol in dB, at bit error rates from 1e-1 to 2e-4.
AWGN_SNR_DB = {
    "bpsk": (-1.0, 2.5, 4.5, 7.0, 8.0),
    "qpsk": (2.0, 5.5, 7.5, 10.0, 11.0),
    "16qam": (8.0, 12.0, 14.0, 16.5, 18.0),
    "64qam": (13.0, 17.5, 19.5, 22.5, 24.0),
    "256qam": (17.5, 23.0, 25.5, 28.5, 29.5),
    "1024qam": (22.5, 28.5, 31.0, 34.5, 35.5),
}
RAYLEIGH_SNR_DB = {
    "bpsk": (2.5, 9.0, 14.0, 24.0, 31.0),
    "qpsk": (5.5, 12.0, 17.0, 27.0, 34.0),
    "16qam": (11.0, 17.5, 23.0, 33.0, 40.0),
    "64qam": (16.0, 23.0, 28.0, 38.0, 45.0),
    "256qam": (20.5, 28.0, 33.0, 43.5, 50.5),
    "1024qam": (25.5, 33.0, 38.5, 48.5, 55.5),
}


def bit_errors(key, modulation, fading, noise_var):
    """Wrong bits of each of `CHUNK` symbols, every one in its own fading block."""
    bits_key, fading_key, noise_key = jax.random.split(key, 3)
    bits = jax.random.bernoulli(bits_key, 0.5, (CHUNK * bits_per_symbol(modulation),))
    symbols = modulate(bits, modulation)[:, jnp.newaxis]
    gains, power = fading.sample(fading_key, CHUNK), jnp.full(CHUNK, POWER)
    estimate = equalize_zf(transmit(noise_key, symbols, gains, power, noise_var), gains, power)
    return jnp.sum((demodulate(estimate[:, 0], modulation) != bits).reshape(CHUNK, -1), axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def error_sums(key, modulation, fading, snr_db):
    """Sums over the symbols of a chunk, for each chunk, of the number of wrong bits and of its square."""
    noise_var = POWER * units.noise_var_from_snr_db(snr_db)

    def chunk(index):
        errors = bit_errors(jax.random.fold_in(key, index), modulation, fading, noise_var)
        return jnp.sum(errors), jnp.sum(errors**2)

    return jax.lax.map(chunk, jnp.arange(NUM_CHUNKS))


def measured_ber(key, modulation, fading, snr_db):
    """Bit error rate and its standard error; the bits of one symbol are not independent, so symbols are the samples."""
    total, squares = (np.asarray(sums, np.float64).sum() for sums in error_sums(key, modulation, fading, snr_db))
    num_symbols = CHUNK * NUM_CHUNKS
    assert total > 100
    mean = total / num_symbols
    error = np.sqrt((squares / num_symbols - mean**2) / (num_symbols - 1))
    return mean / bits_per_symbol(modulation), error / bits_per_symbol(modulation)


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(
    ("fading", "expected", "snrs_db"),
    [(NoFading(), theory.ber_awgn, AWGN_SNR_DB), (RayleighFading(), theory.ber_rayleigh, RAYLEIGH_SNR_DB)],
    ids=["awgn", "rayleigh"],
)
def test_bit_error_rate(modulation, fading, expected, snrs_db):
    for i, snr_db in enumerate(snrs_db[modulation]):
        ber, error = measured_ber(jax.random.key(i), modulation, fading, snr_db)
        exact = expected(units.db_to_linear(snr_db), modulation)
        assert abs(ber - exact) <= FOUR_SIGMA * error, (snr_db, ber, exact, error)


def test_lmmse_decisions_need_unbiasing():
    """Scaled by (1 + gamma) / gamma the LMMSE estimate is the zero-forcing one; unscaled it costs errors."""
    bits = jax.random.bernoulli(jax.random.key(7), 0.5, (32 * CHUNK,))
    symbols, gains = modulate(bits, "16qam")[jnp.newaxis], jnp.array([0.6 - 0.8j])
    power, noise_var = jnp.array([POWER]), POWER / 10
    received = jax.jit(transmit)(jax.random.key(8), symbols, gains, power, noise_var)
    shrunk, unbiased = equalize_lmmse(received, gains, power, noise_var), equalize_zf(received, gains, power)
    np.testing.assert_allclose(shrunk * 1.1, unbiased, rtol=1e-5, atol=1e-6)  # (1 + 10) / 10
    errors = [int(jnp.sum(demodulate(estimate[0], "16qam") != bits)) for estimate in (shrunk, unbiased)]
    assert errors[0] > errors[1] + FOUR_SIGMA * np.sqrt(errors[1])
