"""Tests of Gaussian OPTA against closed forms, a bisection in float64, and the linear scheme that it bounds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import symbols_per_block
from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.codec.linear import LatentStatistics, klt_load, klt_nmse
from megjax.codec.opta import gaussian_distortion, link_bits, opta_nmse

SIZE = 20
VARIANCES = np.geomspace(5.0, 1e-4, SIZE).astype(np.float32)
BITS = np.array([0.0, 1e-3, 0.1, 1.0, 5.0, 20.0, 60.0, 150.0, 300.0], np.float32)
COUNTS = symbols_per_block(7, 3)
DISTORTIONS = jax.jit(jax.vmap(gaussian_distortion, (None, 0)))
NMSE = jax.jit(opta_nmse)


def reference(variances, bits):
    """Reverse water-filling by bisection on the log of the level, float64."""
    logs = np.log2(np.asarray(variances, np.float64))
    low, high = logs.max() - 2 * bits - 1, logs.max()
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(logs - level, 0).sum() / 2 > bits else (low, level)
    return np.minimum(2.0**logs, 2.0**level).sum()


@partial(jax.jit, static_argnums=2)
@partial(jax.vmap, in_axes=(None, 0, None))
def linear_and_optimum(variances, snr, num_symbols):
    """NMSE of the KLT scheme and Gaussian OPTA without fading."""
    size = variances.shape[0]
    statistics = LatentStatistics(jnp.zeros(size), variances, jnp.eye(size))
    load = klt_load(statistics, 2 * num_symbols, snr, mean_lmmse_error_awgn)
    linear = klt_nmse(statistics, load, snr, mean_lmmse_error_awgn)
    return linear, opta_nmse(variances, jnp.asarray(snr)[None], np.array([num_symbols]))


def test_white_source():
    # n v 2^(-2 R), R bits per component
    rates = BITS / SIZE
    np.testing.assert_allclose(DISTORTIONS(np.full(SIZE, 3.0, np.float32), BITS), 60 * 2 ** (-2 * rates), rtol=1e-5)


def test_hand_computed_levels():
    # Variances 4 and 1. One bit brings the first from 4 down to 1; two more bits, one each, bring both to 1/4.
    variances = np.zeros(SIZE, np.float32)
    variances[[3, 7]] = 1.0, 4.0
    bits = np.array([0.0, 0.5, 1.0, 3.0, *[1.0] * 5], np.float32)
    np.testing.assert_allclose(DISTORTIONS(variances, bits), [5.0, 3.0, 2.0, 0.5, *[2.0] * 5], rtol=1e-6)


def test_reverse_water_filling_against_bisection():
    distortion = DISTORTIONS(VARIANCES, BITS)
    np.testing.assert_allclose(distortion, [reference(VARIANCES, b) for b in BITS], rtol=2e-5)
    assert np.all(np.diff(distortion) < 0)
    shuffled = VARIANCES[np.random.default_rng(0).permutation(SIZE)]
    np.testing.assert_allclose(DISTORTIONS(shuffled, BITS), distortion, rtol=1e-6)
    np.testing.assert_array_equal(DISTORTIONS(VARIANCES, np.full_like(BITS, 1e5)), 0)


def test_bits_of_a_link():
    # 3 symbols at log2(1 + 3) = 2 bits, 2 at log2(1 + 1) = 1 bit, 2 at none
    np.testing.assert_allclose(jax.jit(link_bits)(np.array([3.0, 1.0, 0.0], np.float32), COUNTS), 8, rtol=1e-6)


def test_jit_vmap_and_gradient():
    snr = np.random.default_rng(0).exponential(size=(5, 3)).astype(np.float32)
    mapped = jax.jit(jax.vmap(opta_nmse, (None, 0, None)))(VARIANCES, snr, COUNTS)
    assert mapped.dtype == jnp.float32
    np.testing.assert_allclose(mapped, [NMSE(VARIANCES, s, COUNTS) for s in snr], rtol=1e-5)
    np.testing.assert_allclose(NMSE(VARIANCES, np.zeros(3, np.float32), COUNTS), 1, rtol=1e-6)
    gradient = jax.jit(jax.grad(opta_nmse, 1))(VARIANCES, snr[0], COUNTS)
    assert np.all(np.isfinite(gradient)) and np.all(gradient < 0)


@pytest.mark.parametrize("num_symbols", [1, 4, SIZE // 2])
def test_no_linear_scheme_beats_it_without_fading(num_symbols):
    snr = np.geomspace(0.01, 1e3, 6).astype(np.float32)
    linear, optimum = linear_and_optimum(VARIANCES, snr, num_symbols)
    assert np.all(linear > optimum)
    if num_symbols == SIZE // 2:  # a white source at bandwidth ratio one needs no code
        linear, optimum = linear_and_optimum(np.full(SIZE, 2.0, np.float32), snr, num_symbols)
        np.testing.assert_allclose(optimum, 1 / (1 + snr), rtol=1e-5)
        np.testing.assert_allclose(linear, optimum, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_distortion(jnp.array([1.0, -1.0]), 1.0), "variances is .*not all 0"),
        (lambda: gaussian_distortion(jnp.zeros(3), 1.0), "variances is .*not all 0"),
        (lambda: gaussian_distortion(jnp.ones(3), -1.0), "bits is -1.0; it must be finite and 0 or more"),
        (lambda: link_bits(jnp.array([-1.0]), np.array([3])), "snr is"),
        (lambda: link_bits(jnp.array([1.0]), np.array([-3])), "counts is"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
