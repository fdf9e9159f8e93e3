"""Tests of bit mapping and hard decisions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel.modulation import MODULATIONS, bits_per_symbol, constellation, demodulate, modulate
from tests.channel.draws import normal_symbols

pytestmark = pytest.mark.usefixtures("fast_compile")
ROUNDING = 1e-6
MODULATE = jax.jit(modulate, static_argnums=1)


def labels(modulation):
    size = bits_per_symbol(modulation)
    return (np.arange(2**size)[:, np.newaxis] >> np.arange(size)[::-1]) & 1


def random_bits(seed, shape):
    return np.random.default_rng(seed).random(shape) < 0.5


class Mapped(NamedTuple):
    """What the library makes of two vectors of bits and of noisy symbols."""

    points: np.ndarray
    labels: np.ndarray
    symbols: np.ndarray
    symbols_of_integers: list
    symbols_of_each: list
    back: np.ndarray
    decided: np.ndarray
    decided_of_each: list


@functools.cache
def mapped(modulation):
    """Random bits [2 n], noise [2 500], and what one program makes of them: vmapped, and vector by vector."""
    bits, noise = random_bits(0, (2, bits_per_symbol(modulation) * 500)), 1.5 * normal_symbols(1, (2, 500))

    @jax.jit
    def compute(bits, noise):
        def to_symbols(bits):
            return modulate(bits, modulation)

        def to_bits(symbols):
            return demodulate(symbols, modulation)

        points, symbols = constellation(modulation), jax.vmap(to_symbols)(bits)
        integers = [jax.vmap(to_symbols)(bits.astype(dtype)) for dtype in (jnp.int32, jnp.uint8)]
        each = [to_symbols(vector) for vector in bits], [to_bits(vector) for vector in noise]
        decided = jax.vmap(to_bits)(noise)
        return Mapped(points, to_bits(points), symbols, integers, each[0], jax.vmap(to_bits)(symbols), decided, each[1])

    return bits, noise, jax.tree.map(np.asarray, compute(bits, noise))


def test_bits_per_symbol():
    assert [bits_per_symbol(modulation) for modulation in MODULATIONS] == [1, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_constellation(modulation):
    found, size = mapped(modulation)[2], bits_per_symbol(modulation)
    assert found.points.shape == (2**size,) and found.points.dtype == np.complex64
    points = found.points.astype(np.complex128)
    assert len(np.unique(points.round(4))) == 2**size
    np.testing.assert_allclose(np.mean(np.abs(points) ** 2), 1, rtol=ROUNDING)
    np.testing.assert_allclose(np.mean(points), 0, atol=ROUNDING)
    np.testing.assert_array_equal(found.labels, labels(modulation).ravel())


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_nearest_neighbours_differ_in_one_bit(modulation):
    points, bits = mapped(modulation)[2].points.astype(np.complex128), labels(modulation)
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
    np.testing.assert_allclose(MODULATE(jnp.array([0, 0, 1, 0, 1, 1]), "64qam"), expected, rtol=ROUNDING)
    expected = np.array([1 - 1j, -1 + 1j]) / np.sqrt(2)
    np.testing.assert_allclose(MODULATE(jnp.array([0, 1, 1, 0]), "qpsk"), expected, rtol=ROUNDING)
    np.testing.assert_array_equal(MODULATE(jnp.array([True, False]), "bpsk"), [-1, 1])


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_round_trip(modulation):
    bits, _, found = mapped(modulation)
    assert found.symbols.shape == (2, 500) and found.symbols.dtype == np.complex64
    assert found.back.dtype == np.bool_
    np.testing.assert_array_equal(found.back, bits)
    for symbols in found.symbols_of_integers:
        np.testing.assert_array_equal(symbols, found.symbols)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_decides_for_the_nearest_point(modulation):
    _, received, found = mapped(modulation)
    distance = np.abs(received.astype(np.complex128).reshape(-1, 1) - found.points)
    best = labels(modulation)[distance.argmin(axis=1)]
    ordered = np.sort(distance, axis=1)
    clear = ordered[:, 1] - ordered[:, 0] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found.decided.reshape(best.shape)[clear], best[clear])


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_vmap_agrees_with_the_loop(modulation):
    found = mapped(modulation)[2]
    np.testing.assert_allclose(found.symbols, np.stack(found.symbols_of_each), rtol=ROUNDING)
    np.testing.assert_array_equal(found.decided, np.stack(found.decided_of_each))


def test_bad_arguments():
    bits = jnp.asarray(random_bits(4, (8,)))
    for call in (lambda: modulate(bits, "8psk"), lambda: demodulate(jnp.ones(2, jnp.complex64), "8psk")):
        with pytest.raises(ValueError, match="modulation is '8psk'.*bpsk, qpsk, 16qam, 64qam, 256qam, 1024qam"):
            call()
    with pytest.raises(ValueError, match="bits has 8 entries; 64qam takes a multiple of 6"):
        modulate(bits, "64qam")
    with pytest.raises(ValueError, match="bits holds values from 0 to 2; they must be 0 or 1"):
        modulate(jnp.array([0, 1, 2, 1]), "qpsk")
