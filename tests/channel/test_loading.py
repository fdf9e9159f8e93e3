"""Tests of open-loop power loading against its closed form, its optimality conditions, and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from megjax.channel import theory
from megjax.channel.loading import mean_lmmse_error_awgn, static_load
from megjax.units import db_to_linear

pytestmark = pytest.mark.usefixtures("fast_compile")
AWGN = jax.jit(lambda weights, snr: static_load(weights, snr, mean_lmmse_error_awgn))
RAYLEIGH = jax.jit(lambda weights, snr: static_load(weights, snr, theory.mean_lmmse_error_rayleigh))
DECADES = np.geomspace(1, 1e-10, 24).astype(np.float32)


def closed_form(weights, snr):
    """Lee and Petersen: l_k = (sqrt(w_k / price) - 1)+ / snr, float64, with j loads above 0."""
    weights = np.asarray(weights, np.float64)
    order = np.argsort(-weights)
    roots = np.sqrt(weights[order])
    for j in range(len(weights), 0, -1):
        scale = (len(weights) * snr + j) / roots[:j].sum()  # 1 / sqrt(price), from the sum of the loads
        if scale * roots[j - 1] > 1:
            break
    load = np.zeros(len(weights))
    load[order[:j]] = (scale * roots[:j] - 1) / snr
    return load


def rayleigh_error(snr):
    """E[1 / (1 + snr g)], float64, for snr below 500."""
    x = 1 / np.maximum(snr, 2e-3)
    return np.where(snr < 2e-3, 1 - snr + 2 * snr**2, x * np.exp(x) * special.exp1(x))


@pytest.mark.parametrize("snr_db", [-30.0, -10.0, 0.0, 10.0, 30.0, 50.0])
@pytest.mark.parametrize("weights", [DECADES, np.geomspace(3, 0.1, 24).astype(np.float32)[::-1].copy()])
def test_without_fading_the_loads_are_the_closed_form(weights, snr_db):
    load = AWGN(weights, db_to_linear(snr_db))
    assert load.shape == weights.shape and load.dtype == jnp.float32
    # f' is known to float32 rounding, some 4 ulp, and near 1 a load follows from 1 + f' = 2 l snr.
    rounding = 4 * 6e-8 / min(1.0, 10 ** (snr_db / 10))
    np.testing.assert_allclose(load, closed_form(weights, 10 ** (snr_db / 10)), rtol=1e-5, atol=rounding)


def test_hand_computed_loads():
    # snr 1, weights 4 and 1: l = (2 s - 1, s - 1) with 3 s - 2 = 2, so s = 4/3; at snr 1/4 the second gets nothing.
    np.testing.assert_allclose(AWGN(jnp.array([4.0, 1.0]), 1.0), [5 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_array_equal(AWGN(jnp.array([4.0, 1.0]), 0.25), [2, 0])


@pytest.mark.parametrize("ratio", [1.5, 5.0, 100.0])
@pytest.mark.parametrize("snr", [0.1, 3.0, 100.0])
def test_rayleigh_loads_of_two_weights_are_the_best_of_a_grid(ratio, snr):
    load = np.asarray(RAYLEIGH(jnp.array([1.0, ratio]), snr), np.float64)
    grid = np.linspace(0, 2, 20_001)
    error = rayleigh_error(grid * snr) + ratio * rayleigh_error((2 - grid) * snr)
    ours = rayleigh_error(load[0] * snr) + ratio * rayleigh_error(load[1] * snr)
    # On a flat optimum a load off by 1e-4 costs some 1e-8 of the error.
    assert ours <= error.min() * (1 + 1e-7)


@pytest.mark.parametrize("solve", [AWGN, RAYLEIGH])
@pytest.mark.parametrize("snr_db", [-30.0, 10.0, 50.0])
def test_loads_are_finite_of_mean_one_and_follow_the_weights(solve, snr_db):
    weights = np.where(np.arange(24) < 22, DECADES, np.float32(0))
    load = np.asarray(solve(weights, db_to_linear(snr_db)))
    assert np.all(np.isfinite(load)) and np.all(load >= 0)
    np.testing.assert_allclose(load.mean(), 1, rtol=1e-6)
    np.testing.assert_array_equal(load[-2:], 0)
    shuffled = solve(weights[::-1].copy(), db_to_linear(snr_db))
    np.testing.assert_allclose(shuffled[::-1], load, rtol=1e-5)
    # The weights fall, and no weight gets less than a smaller one.
    assert np.all(np.diff(load) <= 1e-6 * load[0])


def test_equal_and_single_weights_share_equally():
    for snr in (0.0, 1e-3, 1.0, 1e5):
        np.testing.assert_array_equal(RAYLEIGH(jnp.full(2, 3.0), snr), 1)
    np.testing.assert_array_equal(AWGN(jnp.array([2.0]), 1.0), 1)
    np.testing.assert_array_equal(AWGN(jnp.zeros(24), 1.0), 1)
    # The limit without power: all of it to the largest weight.
    np.testing.assert_array_equal(AWGN(jnp.asarray(DECADES), 0.0), 24 * (np.arange(24) == 0))


@pytest.mark.slow
def test_a_closure_over_a_law_serves_as_mean_error():
    nakagami = jax.jit(lambda w, m: static_load(w, 5.0, lambda snr: theory.mean_lmmse_error_nakagami(snr, m)))
    weights = jnp.array([3.0, 0.2])
    np.testing.assert_allclose(nakagami(weights, 1.0), RAYLEIGH(weights, 5.0), atol=1e-3)


def test_vmap_agrees_with_the_loop():
    weights = np.random.default_rng(0).uniform(0.01, 3, (3, 24)).astype(np.float32)
    snr = np.array([0.1, 1.0, 10.0], np.float32)
    mapped = jax.jit(jax.vmap(static_load))(weights, snr)
    looped = np.stack([AWGN(w, s) for w, s in zip(weights, snr, strict=True)])
    np.testing.assert_allclose(mapped, looped, rtol=1e-5, atol=1e-6)


def test_error_without_fading():
    np.testing.assert_allclose(mean_lmmse_error_awgn(jnp.array([0.0, 1.0, 3.0])), [1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: static_load(jnp.array([1.0, -1.0]), 1.0), "weights is .*not all 0"),
        (lambda: static_load(jnp.array([1.0, jnp.nan]), 1.0), "weights is .*finite"),
        (lambda: static_load(jnp.zeros(2), 1.0), "weights is .*not all 0"),
        (lambda: static_load(jnp.ones(2), -1.0), "snr is -1.0; it must be finite and 0 or more"),
        (lambda: mean_lmmse_error_awgn(-1.0), "snr is -1.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
