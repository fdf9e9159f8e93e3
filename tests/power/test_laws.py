"""Tests of the laws of the gain and of open-loop powers against closed forms and conditions of optimality."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import (
    GaussMarkovFading,
    JakesFading,
    NakagamiFading,
    NoFading,
    RayleighFading,
    RicianFading,
    static_load,
    theory,
)
from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.power.laws import gain_law, load_table, mean_error, static_power
from megjax.power.problem import power_problem
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
SNRS = np.geomspace(1e-3, 1e4, 15).astype(np.float32)
WEIGHTS = np.geomspace(8, 0.05, 12).astype(np.float32)
POWER, LOAD = jax.jit(static_power), jax.jit(static_load, static_argnums=2)
ROUNDING = 2.0**-23
LAW, TABLE = functools.cache(gain_law), functools.cache(lambda fading: load_table(gain_law(fading)))


class UniformGain:
    """Gains |h|^2 uniform between 0 and 2: a model that the library does not know."""

    dependence = "independent"

    def sample(self, key, num_blocks):
        return jnp.sqrt(jax.random.uniform(key, (num_blocks,), maxval=2.0)).astype(jnp.complex64)


@pytest.mark.parametrize(
    ("fading", "expected"),
    [
        (RayleighFading(), theory.mean_lmmse_error_rayleigh),
        (RicianFading(0.0), theory.mean_lmmse_error_rayleigh),
        (RicianFading(1.0), lambda snr: theory.mean_lmmse_error_rician(snr, 1.0)),
        (RicianFading(30.0), lambda snr: theory.mean_lmmse_error_rician(snr, 30.0)),
        (NakagamiFading(1.0), theory.mean_lmmse_error_rayleigh),
        (NakagamiFading(3.0), lambda snr: theory.mean_lmmse_error_nakagami(snr, 3.0)),
        (NakagamiFading(30.0), lambda snr: theory.mean_lmmse_error_nakagami(snr, 30.0)),
        (NoFading(), mean_lmmse_error_awgn),
    ],
)
def test_mean_gain_and_mean_error_are_those_of_theory(fading, expected):
    law = LAW(fading)
    assert law.gains.shape == law.probabilities.shape and law.gains.dtype == law.probabilities.dtype == jnp.float32
    assert np.all(np.diff(law.gains) > 0) and np.all(np.asarray(law.probabilities) >= 0)
    # float32 sums over the nodes.
    tolerance = len(law.gains) * ROUNDING
    np.testing.assert_allclose(jnp.sum(law.probabilities), 1, atol=tolerance)
    np.testing.assert_allclose(law.mean(law.gains), 1, atol=tolerance)
    # Theory states errors under 1e-5.
    np.testing.assert_allclose(mean_error(law, jnp.asarray(SNRS)), expected(SNRS), rtol=1e-5 + tolerance)


def test_the_heaviest_nakagami_fades_lose_only_what_lies_below_the_nodes():
    # At m = 1/2, P(g < x) is sqrt(2 x / pi) for small x; the nodes begin at exp(-20).
    below = math.sqrt(2 * math.exp(-20) / math.pi)
    law = LAW(NakagamiFading(0.5))
    expected = theory.mean_lmmse_error_nakagami(SNRS, 0.5)
    np.testing.assert_allclose(mean_error(law, jnp.asarray(SNRS)), expected, rtol=1e-5, atol=1.5 * below)


def test_correlation_leaves_the_law_of_a_block_alone():
    for fading in (GaussMarkovFading(0.9), JakesFading(0.1)):
        for ours, rayleigh in zip(gain_law(fading), LAW(RayleighFading()), strict=True):
            np.testing.assert_array_equal(ours, rayleigh)


def test_the_law_of_an_unknown_model_is_sampled():
    law = gain_law(UniformGain(), 16)
    assert np.all(np.diff(law.gains) >= 0)
    np.testing.assert_allclose(jnp.sum(law.probabilities), 1, atol=len(law.gains) * ROUNDING)
    samples = 2**17
    np.testing.assert_allclose(law.mean(law.gains), 1, atol=3 * math.sqrt(1 / 3 / samples))
    for snr in (0.1, 1.0, 10.0):
        # E 1 / (1 + x g) = ln(1 + 2 x) / 2 x and E 1 / (1 + x g)^2 = 1 / (1 + 2 x).
        mean = math.log1p(2 * snr) / (2 * snr)
        deviation = math.sqrt(1 / (1 + 2 * snr) - mean**2)
        np.testing.assert_allclose(mean_error(law, jnp.float32(snr)), mean, atol=3 * deviation / math.sqrt(samples))


@pytest.mark.parametrize("snr", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize(
    ("fading", "error", "curvature"),
    [(NoFading(), mean_lmmse_error_awgn, 0.0), (RayleighFading(), theory.mean_lmmse_error_rayleigh, 0.5)],
)
def test_static_power_is_the_static_load(fading, error, curvature, snr):
    power = np.asarray(POWER(TABLE(fading), WEIGHTS, snr, float(len(WEIGHTS))))
    load = np.asarray(LOAD(WEIGHTS, snr, error))
    assert power.shape == WEIGHTS.shape and power.dtype == np.float32
    # ln(1 + p snr) is interpolated linearly in steps of 0.08, and is linear without fading.
    interpolation = curvature * 0.08**2 / 8 + 1e-5
    np.testing.assert_array_less(np.abs(power - load) * snr, interpolation * (1 + load * snr) + 1e-12)
    np.testing.assert_allclose(power.sum(), len(WEIGHTS), rtol=len(WEIGHTS) * ROUNDING)
    cost, best = np.sum(WEIGHTS * error(power * snr)), np.sum(WEIGHTS * error(load * snr))
    assert cost <= best * (1 + interpolation**2 + len(WEIGHTS) * ROUNDING)


def test_hand_computed_powers():
    # snr 1, weights 4 and 1, energy 2: p = (2 s - 1, s - 1) with 3 s - 2 = 2, so s = 4/3.
    table = TABLE(NoFading())
    np.testing.assert_allclose(POWER(table, jnp.array([4.0, 1.0]), 1.0, 2.0), [5 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_array_equal(POWER(table, jnp.array([4.0, 1.0]), 0.25, 2.0), [2, 0])


@pytest.mark.parametrize("snr", [0.1, 10.0])
def test_a_peak_caps_the_largest_and_leaves_the_rest_optimal(snr):
    table = TABLE(RayleighFading())
    power = np.asarray(POWER(table, jnp.array([50.0, 2.0, 1.0, 1.0]), snr, 4.0, 1.5))
    assert power[0] == 1.5 and np.all(power <= 1.5)
    rest = POWER(table, jnp.array([2.0, 1.0, 1.0]), snr, 2.5, 1.5)
    # A price rounded to 4e-6 of ln(1 + p snr) leaves the powers off by that much of p + 1 / snr.
    np.testing.assert_allclose(power[1:], rest, atol=4e-6 * (1.5 + 1 / snr))
    np.testing.assert_allclose(power.sum(), 4, atol=4 * 4e-6 * (1.5 + 1 / snr))


def test_weights_of_zero_get_nothing():
    table = TABLE(RayleighFading())
    power = np.asarray(POWER(table, jnp.array([1.0, 0.0, 3.0, 0.0]), 1.0, 4.0))
    assert power[1] == power[3] == 0
    np.testing.assert_allclose(power.sum(), 4, rtol=4 * ROUNDING)
    # Nor what the others cannot take.
    np.testing.assert_array_equal(POWER(table, jnp.array([1.0, 0.0, 0.0, 0.0]), 1.0, 4.0, 1.5), [1.5, 0, 0, 0])


def test_equal_weights_share_equally_and_one_block_takes_all():
    table = TABLE(RayleighFading())
    np.testing.assert_allclose(POWER(table, jnp.full(4, 3.0), 1.0, 6.0), 1.5, rtol=4 * ROUNDING)
    np.testing.assert_allclose(POWER(table, jnp.ones(1), 1.0, 2.0), 2, rtol=4 * ROUNDING)


def test_vmap_agrees_with_the_loop():
    table, snrs = TABLE(RayleighFading()), jnp.array([0.1, 1.0, 10.0])
    mapped = jax.jit(jax.vmap(static_power, (None, None, 0, None)))(table, WEIGHTS, snrs, 12.0)
    looped = np.stack([POWER(table, WEIGHTS, snr, 12.0) for snr in snrs])
    np.testing.assert_allclose(mapped, looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gain_law(UniformGain(), 0), "num_blocks is 0"),
        (lambda: gain_law(RayleighFading(), 0), "num_blocks is 0"),
        (lambda: power_problem(0.0, 0), "num_blocks is 0"),
        (lambda: power_problem(0.0, -1), "num_blocks is -1"),
        (lambda: power_problem(math.nan), "snr_db is nan"),
        (lambda: power_problem(0.0, mean_power=0.0), "mean_power is 0.0"),
        (lambda: power_problem(0.0, mean_power=math.nan), "mean_power is nan"),
        (lambda: power_problem(0.0, mean_power=math.inf), "mean_power is inf"),
        (lambda: power_problem(0.0, max_power=0.0), "max_power is 0.0"),
        (lambda: power_problem(0.0, max_power=math.nan), "max_power is nan"),
        (lambda: power_problem(0.0, 4, np.ones(3)), "weights' shape is"),
        (lambda: power_problem(0.0, 2, np.array([1.0, -1.0])), "weights is"),
        (lambda: power_problem(0.0, 2, np.array([1.0, math.nan])), "weights is"),
        (lambda: power_problem(0.0, 2, np.zeros(2)), "weights is .*not all 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_products_are_exact():
    def plan(law, weights):
        power = static_power(load_table(law), weights, 2.0, 12.0)
        return power, mean_error(law, power)

    assert inexact_products(plan, LAW(RayleighFading()), WEIGHTS, gradient=True) == []
