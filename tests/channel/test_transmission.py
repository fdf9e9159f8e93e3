"""Tests of transmission, LMMSE and zero-forcing equalisation against closed forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import units
from megjax.channel.fading import RayleighFading
from megjax.channel.random import complex_normal
from megjax.channel.transmission import (
    equalize_lmmse,
    equalize_zf,
    lmmse_error_var,
    post_equalisation_snr,
    transmit,
    zf_error_var,
)
from tests.channel.draws import normal_symbols
from tests.checks import within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM_SYMBOLS = 20_000
GAINS = np.complex64([1.0, 0.3 - 0.8j, 0.1j])
POWER = np.float32([1.0, 1.7, 0.3])


class Link(NamedTuple):
    """Blocks received, and what the receivers make of them."""

    received: np.ndarray
    lmmse: np.ndarray
    zf: np.ndarray
    snr: np.ndarray
    lmmse_var: np.ndarray
    zf_var: np.ndarray


@jax.jit
def receive(received, gains, power, noise_var):
    lmmse, zf = equalize_lmmse(received, gains, power, noise_var), equalize_zf(received, gains, power)
    functions = post_equalisation_snr, lmmse_error_var, zf_error_var
    return Link(received, lmmse, zf, *(function(gains, power, noise_var) for function in functions))


TRANSMIT = jax.jit(transmit)


def link(seed, symbols, noise_var, power=POWER):
    received = TRANSMIT(jax.random.key(seed), symbols, GAINS, power, noise_var)
    return Link(*map(np.asarray, receive(received, GAINS, power, noise_var)))


def test_noise_is_absolute_and_circular():
    noise_var, symbols = 0.25, normal_symbols(0, (3, NUM_SYMBOLS))
    received = link(1, symbols, noise_var).received
    assert received.shape == symbols.shape and received.dtype == jnp.complex64
    noise = received - (np.sqrt(POWER) * GAINS)[:, None] * symbols
    within_standard_error(np.abs(noise) ** 2, noise_var, axis=1)
    within_standard_error(noise.real, 0.0, axis=1)
    within_standard_error(noise.real * noise.imag, 0.0, axis=1)
    within_standard_error(np.abs(received) ** 2, POWER * np.abs(GAINS) ** 2 + noise_var, axis=1)


def test_twice_the_power_is_3_db_more():
    symbols = normal_symbols(4, (3, NUM_SYMBOLS))
    once, twice = (link(5, symbols, 0.5, power) for power in (POWER, 2 * POWER))

    def measured_snr(received, power):
        clean = (np.sqrt(power) * GAINS)[:, None] * symbols
        return np.mean(np.abs(clean) ** 2, axis=1) / np.mean(np.abs(received - clean) ** 2, axis=1)

    # Same symbols and noise in both: the ratio is exact up to rounding (float32 cancellation in received - clean).
    gain = measured_snr(twice.received, 2 * POWER) / measured_snr(once.received, POWER)
    np.testing.assert_allclose(10 * np.log10(gain), 10 * np.log10(2), atol=1e-3)
    np.testing.assert_allclose(10 * np.log10(twice.snr / once.snr), 10 * np.log10(2), atol=1e-4)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 12.0])
def test_error_variances(snr_db):
    noise_var, symbols = float(units.noise_var_from_snr_db(snr_db)), normal_symbols(6, (3, NUM_SYMBOLS))
    found = link(7, symbols, noise_var)
    error = found.lmmse - symbols
    within_standard_error(np.abs(error) ** 2, 1 / (1 + found.snr), axis=1)
    np.testing.assert_allclose(found.lmmse_var, 1 / (1 + found.snr), rtol=1e-6)
    # Orthogonality of error and observation characterises the LMMSE estimate.
    within_standard_error((error * found.received.conj()).real, 0.0, axis=1)
    # Zero forcing is unbiased: its error does not depend on the symbols.
    assert found.zf.shape == symbols.shape and found.zf.dtype == jnp.complex64
    error = found.zf - symbols
    within_standard_error(np.abs(error) ** 2, found.zf_var, axis=1)
    within_standard_error((error * symbols.conj()).real, 0.0, axis=1)
    np.testing.assert_allclose(found.lmmse * ((1 + found.snr) / found.snr)[:, None], found.zf, rtol=1e-5, atol=1e-5)


def test_hand_computed_values():
    # LMMSE: sqrt(4) conj(1j) (2 + 2j) / (4 + 1) = 2 (-1j) (2 + 2j) / 5 = (4 - 4j) / 5
    # zero forcing: (2 + 2j) / (sqrt(4) 1j) = 1 - 1j; gamma = 4 / 1
    found = receive(np.complex64([[2 + 2j]]), np.complex64([1j]), np.float32([4.0]), 1.0)
    np.testing.assert_allclose(found.lmmse, [[0.8 - 0.8j]], rtol=1e-6)
    np.testing.assert_allclose(found.zf, [[1 - 1j]], rtol=1e-6)
    np.testing.assert_allclose([found.snr, found.lmmse_var, found.zf_var], [[4], [1 / 5], [1 / 4]], rtol=1e-6)
    plain = equalize_lmmse(jnp.array([[2 + 2j]]), jnp.array([1j]), jnp.array([4.0]), 1.0)
    np.testing.assert_allclose(plain, found.lmmse, rtol=1e-6)


@pytest.mark.slow
def test_vmap_and_jit_agree_with_the_loop():
    def one(key, noise_var):
        fading_key, noise_key, symbol_key = jax.random.split(key, 3)
        gains = RayleighFading().sample(fading_key, 3)
        symbols = complex_normal(symbol_key, (3, 5))
        power = jnp.asarray(POWER)
        received = transmit(noise_key, symbols, gains, power, noise_var)
        return equalize_lmmse(received, gains, power, noise_var), equalize_zf(received, gains, power)

    noise_vars = np.float32([0.1, 1.0, 10.0])
    mapped = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), 3), noise_vars)
    compiled = jax.jit(one)
    loop = [compiled(key, var) for key, var in zip(jax.random.split(jax.random.key(8), 3), noise_vars, strict=True)]
    for several, each in zip(mapped, zip(*loop, strict=True), strict=True):
        np.testing.assert_allclose(several, np.stack(each), rtol=1e-4, atol=1e-6)


def test_gradients_are_finite_and_nonzero():
    symbols = normal_symbols(9, (3, 8))

    def error(power, scale, noise_var):
        gains = jnp.asarray(GAINS)
        received = transmit(jax.random.key(10), scale * symbols, gains, power, noise_var)
        return jnp.mean(jnp.abs(equalize_lmmse(received, gains, power, noise_var) - symbols) ** 2)

    gradients = jax.jit(jax.grad(error, argnums=(0, 1, 2)))
    for gradient in gradients(POWER, 1.0, 0.3):
        assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient) != 0)
    silent = np.float32([1.0, 0.0, 2.0])
    for gradient in gradients(silent, 1.0, 0.3):
        assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(receive(symbols, GAINS, silent, 0.3).lmmse[1], np.zeros(8))


def test_mismatched_shapes_are_rejected(unchecked):
    with pytest.raises(ValueError, match=r"shapes are symbols \(4, 2\), gains \(3,\), power \(3,\)"):
        transmit(jax.random.key(0), normal_symbols(13, (4, 2)), GAINS, POWER, 1.0)


def test_zero_forcing_of_blocks_without_power_or_gain():
    power, gains = np.float32([1.0, 0.0, 2.0]), np.complex64([1.0, 0.5, 0.0])
    received = normal_symbols(16, (3, 8))

    def summary(gains, power):
        found = receive(received, gains, power, 0.3)
        return jnp.sum(jnp.abs(found.zf) ** 2) + jnp.sum(found.zf_var), found

    gradients, found = jax.jit(jax.grad(summary, argnums=(0, 1), has_aux=True))(gains, power)
    np.testing.assert_array_equal(found.zf[1:], np.zeros((2, 8)))
    np.testing.assert_allclose(found.zf_var, [0.3, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(found.lmmse_var, [0.3 / 1.3, 1, 1], rtol=1e-6)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient)) and gradient[0] != 0


def test_noise_variance_per_block():
    noise_vars, received = np.float32([0.1, 0.5, 2.0]), normal_symbols(17, (3, 4))
    together = receive(received, GAINS, POWER, noise_vars)
    for i in range(3):
        rows = slice(i, i + 1)
        one = receive(received[rows], GAINS[rows], POWER[rows], noise_vars[i])
        for several, single in zip(together, one, strict=True):
            np.testing.assert_allclose(several[i], single[0], rtol=1e-6)


def test_receiver_with_estimated_gains():
    """Gains known up to an error of variance e: the LMMSE receiver counts power * e as noise."""
    error_var, noise_var, power = 0.2, 0.3, np.full(NUM_SYMBOLS, 1.5, np.float32)
    known, error = normal_symbols(18, (2, NUM_SYMBOLS)) * np.float32([[1 - error_var], [error_var]]) ** 0.5
    symbols = normal_symbols(19, (NUM_SYMBOLS, 1))
    received = TRANSMIT(jax.random.key(18), symbols, known + error, power, noise_var)
    found = receive(received, known, power, noise_var + power * np.float32(error_var))
    within_standard_error(np.abs(found.lmmse - symbols)[:, 0] ** 2 - found.lmmse_var, 0.0)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_powers_and_noise(bad):
    symbols, gains, power = jnp.asarray(normal_symbols(14, (3, 2))), jnp.asarray(GAINS), jnp.asarray(POWER)
    with pytest.raises(ValueError, match="^power is .*; it must be finite and 0 or more$"):
        transmit(jax.random.key(0), symbols, gains, power.at[1].set(bad), 1.0)
    with pytest.raises(ValueError, match="^noise_var is .*; it must be finite and 0 or more$"):
        transmit(jax.random.key(0), symbols, gains, power, bad)
    for call in (
        lambda var: equalize_lmmse(symbols, gains, power, var),
        lambda var: post_equalisation_snr(gains, power, var),
    ):
        for value in (bad, 0.0):
            with pytest.raises(ValueError, match="^noise_var is .*; it must be finite and more than 0$"):
                call(value)
