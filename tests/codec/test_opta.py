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

DISTORTION = jax.jit(gaussian_distortion)
VARIANCES = jnp.geomspace(5.0, 1e-4, 20)


def reference(variances, bits):
    """Reverse water-filling by bisection on the log of the level, float64."""
    logs = np.log2(np.asarray(variances, np.float64))
    low, high = logs.max() - 2 * bits - 1, logs.max()
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(logs - level, 0).sum() / 2 > bits else (low, level)
    return np.minimum(2.0**logs, 2.0**level).sum()


@partial(jax.jit, static_argnums=2)
def linear_and_optimum(variances, snr, num_symbols):
    """NMSE of the KLT scheme and Gaussian OPTA without fading."""
    size = variances.shape[0]
    statistics = LatentStatistics(jnp.zeros(size), variances, jnp.eye(size))
    load = klt_load(statistics, 2 * num_symbols, snr, mean_lmmse_error_awgn)
    linear = klt_nmse(statistics, load, snr, mean_lmmse_error_awgn)
    return linear, opta_nmse(variances, jnp.asarray(snr)[None], np.array([num_symbols]))


def test_white_source():
    # n v 2^(-2 R), R bits per component
    for rate in (0.0, 0.1, 1.0, 7.0):
        np.testing.assert_allclose(DISTORTION(jnp.full(6, 3.0), 6 * rate), 18 * 2 ** (-2 * rate), rtol=1e-5)


def test_hand_computed_levels():
    # Variances 4 and 1. One bit brings the first from 4 down to 1; two more bits, one each, bring both to 1/4.
    variances = jnp.array([1.0, 4.0])
    for bits, expected in ((0.0, 5.0), (0.5, 3.0), (1.0, 2.0), (3.0, 0.5)):
        np.testing.assert_allclose(DISTORTION(variances, bits), expected, rtol=1e-6)


def test_reverse_water_filling_against_bisection():
    bits = np.array([0.0, 1e-3, 0.1, 1.0, 5.0, 20.0, 60.0, 150.0, 300.0])
    distortion = jax.jit(jax.vmap(gaussian_distortion, (None, 0)))(VARIANCES, jnp.asarray(bits, jnp.float32))
    np.testing.assert_allclose(distortion, [reference(VARIANCES, b) for b in bits], rtol=2e-5)
    assert np.all(np.diff(distortion) < 0)
    shuffled = VARIANCES[np.random.default_rng(0).permutation(20)]
    np.testing.assert_allclose(DISTORTION(shuffled, 20.0), distortion[5], rtol=1e-6)
    np.testing.assert_allclose(DISTORTION(jnp.append(VARIANCES, 0.0), 20.0), distortion[5], rtol=1e-6)
    np.testing.assert_array_equal(DISTORTION(VARIANCES, 1e5), 0)


def test_bits_of_a_link():
    # 3 symbols at log2(1 + 3) = 2 bits, 2 at log2(1 + 1) = 1 bit, 2 at none
    np.testing.assert_allclose(link_bits(jnp.array([3.0, 1.0, 0.0]), symbols_per_block(7, 3)), 8, rtol=1e-6)


def test_nmse_without_signal_is_one():
    np.testing.assert_allclose(opta_nmse(VARIANCES, jnp.zeros(3), symbols_per_block(7, 3)), 1, rtol=1e-6)


def test_jit_and_vmap_agree_with_the_loop():
    snr = jax.random.exponential(jax.random.key(0), (5, 4))
    counts = symbols_per_block(6, 4)
    mapped = jax.jit(jax.vmap(lambda s: opta_nmse(VARIANCES, s, counts)))(snr)
    assert mapped.dtype == jnp.float32
    np.testing.assert_allclose(mapped, [opta_nmse(VARIANCES, s, counts) for s in snr], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda s: opta_nmse(VARIANCES, s, counts)))(snr[0])
    assert np.all(np.isfinite(gradient)) and np.all(gradient < 0)


@pytest.mark.parametrize("num_symbols", [1, 4, 10])
def test_no_linear_scheme_beats_it_without_fading(num_symbols):
    linear, optimum = jax.vmap(lambda snr: linear_and_optimum(VARIANCES, snr, num_symbols))(jnp.geomspace(0.01, 1e3, 6))
    assert np.all(linear > optimum)


def test_a_white_source_at_bandwidth_ratio_one_needs_no_code():
    for snr in (0.01, 1.0, 300.0):
        linear, optimum = linear_and_optimum(jnp.full(8, 2.0), snr, 4)
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
