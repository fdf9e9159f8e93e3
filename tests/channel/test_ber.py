"""Bit error rates of the whole link, bits to decisions, against the exact formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import theory
from megjax.channel.fading import NoFading, RayleighFading
from megjax.channel.modulation import MODULATIONS, bits_per_symbol, demodulate, modulate
from megjax.channel.transmission import equalize_lmmse, equalize_zf, transmit
from tests.checks import STANDARD_ERRORS, within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
POWER = 1.7
NUM_SYMBOLS = 2**17
LAWS = {"awgn": (NoFading(), theory.ber_awgn), "rayleigh": (RayleighFading(), theory.ber_rayleigh)}
# SNRs per symbol in dB, at bit error rates from 1e-1 to 1e-3.
SNR_DB = {
    "awgn": {
        "bpsk": (-1.0, 4.5, 6.8),
        "qpsk": (2.0, 7.5, 10.0),
        "16qam": (8.0, 14.0, 16.5),
        "64qam": (13.0, 19.5, 22.5),
        "256qam": (17.5, 25.5, 28.5),
        "1024qam": (22.5, 31.0, 34.5),
    },
    "rayleigh": {
        "bpsk": (2.5, 14.0, 24.0),
        "qpsk": (5.5, 17.0, 27.0),
        "16qam": (11.0, 23.0, 33.0),
        "64qam": (16.0, 28.0, 38.0),
        "256qam": (20.5, 33.0, 43.5),
        "1024qam": (25.5, 38.5, 48.5),
    },
}


@functools.partial(jax.jit, static_argnums=1)
def bit_errors(key, modulation, snr):
    """Wrong bits [l s n] of n symbols, each in a fading block of its own, and the formula's error rates [l s].

    `snr` is [l s], l laws; the bits and the noise are the same for all of them.
    """
    bits_key, fading_key, noise_key = jax.random.split(key, 3)
    bits = jax.random.bernoulli(bits_key, 0.5, (NUM_SYMBOLS * bits_per_symbol(modulation),))
    symbols = modulate(bits, modulation)[:, jnp.newaxis]
    power = jnp.full(NUM_SYMBOLS, POWER)

    def errors(gains, noise_var):
        estimate = equalize_zf(transmit(noise_key, symbols, gains, power, noise_var), gains, power)
        return jnp.sum((demodulate(estimate[:, 0], modulation) != bits).reshape(NUM_SYMBOLS, -1), axis=1)

    gains = jnp.stack([law.sample(jax.random.clone(fading_key), NUM_SYMBOLS) for law, _ in LAWS.values()])
    expected = jnp.stack([formula(row, modulation) for (_, formula), row in zip(LAWS.values(), snr, strict=True)])
    return jax.vmap(jax.vmap(errors, (None, 0)))(gains, POWER / snr), expected


@pytest.mark.parametrize(
    "modulation", [pytest.param(each, marks=() if each == "64qam" else pytest.mark.slow) for each in MODULATIONS]
)
def test_bit_error_rates(modulation):
    snr = 10 ** (np.array([SNR_DB[law][modulation] for law in LAWS], np.float32) / 10)
    errors, exact = map(np.asarray, bit_errors(jax.random.key(0), modulation, snr))
    assert np.all(errors.sum(axis=-1) > 100)
    # The bits of one symbol are not independent, so symbols are the samples.
    within_standard_error(errors / bits_per_symbol(modulation), exact, axis=-1)


def test_lmmse_decisions_need_unbiasing():
    """Scaled by (1 + gamma) / gamma the LMMSE estimate is the zero-forcing one; unscaled it costs errors."""
    noise_var = POWER / 10

    @jax.jit
    def estimates(key):
        bits_key, noise_key = jax.random.split(key)
        bits = jax.random.bernoulli(bits_key, 0.5, (2**18,))
        symbols, gains, power = modulate(bits, "16qam")[jnp.newaxis], jnp.array([0.6 - 0.8j]), jnp.array([POWER])
        received = transmit(noise_key, symbols, gains, power, noise_var)
        shrunk, unbiased = equalize_lmmse(received, gains, power, noise_var), equalize_zf(received, gains, power)
        return shrunk, unbiased, [jnp.sum(demodulate(each[0], "16qam") != bits) for each in (shrunk, unbiased)]

    shrunk, unbiased, errors = estimates(jax.random.key(7))
    np.testing.assert_allclose(shrunk * 1.1, unbiased, rtol=1e-5, atol=1e-6)  # (1 + 10) / 10
    assert int(errors[0]) > int(errors[1]) + STANDARD_ERRORS * np.sqrt(int(errors[1]))
