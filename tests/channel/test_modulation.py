"""Tests of bit mapping and hard decisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel.modulation import MODULATIONS, bits_per_symbol, constellation, demodulate, modulate
from megjax.channel.random import complex_normal

ROUNDING = 1e-6
NOISE = jax.jit(complex_normal, static_argnums=1)


def labels(modulation):
    size = bits_per_symbol(modulation)
    return (np.arange(2**size)[:, np.newaxis] >> np.arange(size)[::-1]) & 1


def random_bits(seed, shape):
    return jax.random.bernoulli(jax.random.key(seed), 0.5, shape)


def test_bits_per_symbol():
    assert [bits_per_symbol(modulation) for modulation in MODULATIONS] == [1, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_constellation(modulation):
    points = constellation(modulation)
    size = bits_per_symbol(modulation)
    assert points.shape == (2**size,) and points.dtype == jnp.complex64
    points = np.asarray(points, np.complex128)
    assert len(np.unique(points.round(4))) == 2**size
    np.testing.assert_allclose(np.mean(np.abs(points) ** 2), 1, rtol=ROUNDING)
    np.testing.assert_allclose(np.mean(points), 0, atol=ROUNDING)
    np.testing.assert_array_equal(np.asarray(demodulate(jnp.asarray(points), modulation)), labels(modulation).ravel())


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_nearest_neighbours_differ_in_one_bit(modulation):
    points, bits = np.asarray(constellation(modulation), np.complex128), labels(modulation)
    distance = np.abs(points[:, np.newaxis] - points)
    nearest = np.isclose(distance, distance[distance > 0.01].min(), rtol=1e-3)
    differing = (bits[:, np.newaxis] != bits).sum(axis=-1)
    assert nearest.any() and np.all(differing[nearest] == 1)


def test_hand_computed_values():
    # TS 38.211, section 5.1: 16-QAM 0000 -> (1 + j) / sqrt(10), 0010 -> (3 + j), 1001 -> (-1 + 3j)
    bits = jnp.array([0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1])
    expected = np.array([1 + 1j, 3 + 1j, -1 + 3j]) / np.sqrt(10)
    np.testing.assert_allclose(modulate(bits, "16qam"), expected, rtol=ROUNDING)
    # 64-QAM 001011: in-phase bits 0 1 1, 4 - (-1) (2 - (-1)) = 7; quadrature bits 0 0 1, 4 - (2 - (-1)) = 1
    expected = np.array([7 + 1j]) / np.sqrt(42)
    np.testing.assert_allclose(modulate(jnp.array([0, 0, 1, 0, 1, 1]), "64qam"), expected, rtol=ROUNDING)
    expected = np.array([1 - 1j, -1 + 1j]) / np.sqrt(2)
    np.testing.assert_allclose(modulate(jnp.array([0, 1, 1, 0]), "qpsk"), expected, rtol=ROUNDING)
    np.testing.assert_array_equal(modulate(jnp.array([True, False]), "bpsk"), [-1, 1])


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_round_trip(modulation):
    bits = random_bits(0, (bits_per_symbol(modulation) * 500,))
    symbols = modulate(bits, modulation)
    assert symbols.shape == (500,) and symbols.dtype == jnp.complex64
    back = demodulate(symbols, modulation)
    assert back.dtype == jnp.bool_
    np.testing.assert_array_equal(back, bits)
    for dtype in (jnp.int32, jnp.uint8):
        np.testing.assert_array_equal(modulate(bits.astype(dtype), modulation), symbols)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_decides_for_the_nearest_point(modulation):
    received = 1.5 * NOISE(jax.random.key(1), (2000,))
    points = np.asarray(constellation(modulation), np.complex128)
    distance = np.abs(np.asarray(received, np.complex128)[:, np.newaxis] - points)
    best = labels(modulation)[distance.argmin(axis=1)]
    ordered = np.sort(distance, axis=1)
    clear = ordered[:, 1] - ordered[:, 0] > 1e-5
    decided = np.asarray(demodulate(received, modulation)).reshape(2000, -1)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(decided[clear], best[clear])


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_vmap_and_jit_agree_with_the_loop(modulation):
    batch = random_bits(2, (3, bits_per_symbol(modulation) * 7))
    symbols = jax.jit(jax.vmap(lambda bits: modulate(bits, modulation)))(batch)
    np.testing.assert_allclose(symbols, np.stack([modulate(bits, modulation) for bits in batch]), rtol=ROUNDING)
    noisy = symbols + 0.3 * NOISE(jax.random.key(3), symbols.shape)
    back = jax.jit(jax.vmap(lambda symbols: demodulate(symbols, modulation)))(noisy)
    np.testing.assert_array_equal(back, np.stack([demodulate(symbols, modulation) for symbols in noisy]))


def test_bad_arguments():
    bits = random_bits(4, (8,))
    for call in (lambda: modulate(bits, "8psk"), lambda: demodulate(jnp.ones(2, jnp.complex64), "8psk")):
        with pytest.raises(ValueError, match="modulation is '8psk'.*bpsk, qpsk, 16qam, 64qam, 256qam, 1024qam"):
            call()
    with pytest.raises(ValueError, match="bits has 8 entries; 64qam takes a multiple of 6"):
        modulate(bits, "64qam")
    with pytest.raises(ValueError, match="bits holds values from 0 to 2; they must be 0 or 1"):
        modulate(jnp.array([0, 1, 2, 1]), "qpsk")
