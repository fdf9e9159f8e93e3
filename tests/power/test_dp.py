"""Tests of the causal optimum against reference values, exhaustive search, simulation and the other policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import GaussMarkovFading, JakesFading, RayleighFading, ShadowedFading
from megjax.numerics import squared_magnitude
from megjax.power import (
    CausalOptimum,
    ChannelInversion,
    Clairvoyant,
    EqualPower,
    GainLaw,
    LoadedPower,
    StaticPower,
    Waterfilling,
    causal_optimum,
    gain_law,
    load_table,
    power_problem,
)
from megjax.power.policies.dp import markov_law
from tests.products import inexact_products

T, EPISODES = 16, 2**14
RHO = 0.9
UNEQUAL = np.geomspace(4, 0.1, T)
POWER = jax.jit(jax.vmap(lambda policy, gains, problem: policy.allocate(gains, problem), (None, 0, None)))
VALUE = jax.jit(lambda policy, problem: policy.expected_return(problem))
OPTIMUM = functools.cache(causal_optimum)


@functools.cache
def sample(fading, seed):
    keys = jax.random.split(jax.random.key(seed), EPISODES)
    return jax.jit(jax.vmap(lambda key: squared_magnitude(fading.sample(key, T))))(keys)


def returns(policy, gains, problem):
    """-sum_t w_t / (1 + p_t g_t snr) [episodes], float64."""
    power = np.asarray(POWER(policy, gains, problem), np.float64)
    snr = power * np.asarray(gains, np.float64) * float(problem.snr)
    return -(np.asarray(problem.weights, np.float64) / (1 + snr)).sum(1)


def standard_error(values):
    return values.std(ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize(
    ("snr_db", "expected"),
    [(-10.0, (-14.650, -14.108, -14.032)), (0.0, (-9.542, -9.253, -9.207)), (10.0, (-3.223, -3.034, -2.998))],
)
def test_reference_values(snr_db, expected):
    # Means over 1e5 transmissions of an independent implementation, with their own sampling error and rounding.
    problem, gains = power_problem(snr_db, T), sample(RayleighFading(), 2)
    for policy, reference in zip((EqualPower(), OPTIMUM(RayleighFading()), Clairvoyant()), expected, strict=True):
        values = returns(policy, gains, problem)
        both = standard_error(values) * np.sqrt(1 + EPISODES / 1e5)
        np.testing.assert_allclose(values.mean(), reference, rtol=0, atol=3 * both + 5e-4)


CHAIN = pytest.param(GaussMarkovFading(RHO), marks=pytest.mark.slow)


@pytest.mark.parametrize("fading", [RayleighFading(), CHAIN])
@pytest.mark.parametrize(("snr_db", "weights"), [(0.0, None), (10.0, UNEQUAL)])
def test_the_expected_return_is_that_of_simulation(fading, snr_db, weights):
    problem = power_problem(snr_db, T, weights)
    values = returns(OPTIMUM(fading), sample(fading, 3), problem)
    # The quadrature's own error is stated as 1e-3.
    np.testing.assert_allclose(
        VALUE(OPTIMUM(fading), problem), values.mean(), rtol=0, atol=3 * standard_error(values) + 1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fading", "weights", "snr_db"),
    [
        (RayleighFading(), None, -10.0),
        (RayleighFading(), UNEQUAL, 10.0),
        (GaussMarkovFading(RHO), None, 10.0),
        (GaussMarkovFading(RHO), UNEQUAL, -10.0),
    ],
)
def test_no_causal_policy_beats_the_optimum(fading, weights, snr_db):
    law = gain_law(RayleighFading())
    others = [
        EqualPower(),
        StaticPower(load_table(law)),
        LoadedPower(jnp.linspace(2, 0.5, T)),
        ChannelInversion(law),
        Waterfilling(law),
        OPTIMUM(RayleighFading()),
    ]
    problem, gains = power_problem(snr_db, T, weights), sample(fading, 4)
    best = returns(OPTIMUM(fading), gains, problem)
    for other in others:
        ahead = best - returns(other, gains, problem)
        assert ahead.mean() >= -3 * standard_error(ahead), type(other).__name__


@pytest.mark.parametrize("max_power", [np.inf, 1.2])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (0.0, 1.0)])
def test_two_blocks_of_two_gains_against_exhaustive_search(weights, snr_db, max_power):
    nodes, probabilities = np.array([0.25, 2.0]), np.array([0.375, 0.625])
    optimum = CausalOptimum(GainLaw(jnp.asarray(nodes, jnp.float32), jnp.asarray(probabilities, jnp.float32)))
    problem = power_problem(snr_db, 2, np.array(weights), max_power=max_power)
    snr, peak = 10 ** (snr_db / 10), min(max_power, 2.0)

    def cost(gain, first):
        """Expected error [n] of block 1 at powers `first` [n] and of block 2 with what is left."""
        second = np.minimum(2 - first, peak)[:, None]
        return weights[0] / (1 + first * gain * snr) + weights[1] / (1 + second * nodes * snr) @ probabilities

    power = np.asarray(POWER(optimum, jnp.asarray(np.repeat(nodes[:, None], 2, 1), jnp.float32), problem), np.float64)
    least = []
    for gain, ours in zip(nodes, power[:, :1], strict=True):
        best = cost(gain, np.linspace(0, peak, 20_001)).min()
        least.append(best)
        # Off by 1e-4 on a flat optimum costs some 1e-8.
        assert cost(gain, ours)[0] <= best * (1 + 1e-7)
    np.testing.assert_allclose(power[:, 1], np.minimum(2 - power[:, 0], peak), rtol=1e-6)
    # Two gains make the price jump where a block reaches its peak, by no more than the benefit there; the trapezoidal
    # rule then errs by up to half of the largest step of the grid of 193 energies, 3 * 2 / 192, times the jump.
    benefit = max(w * g * snr / (1 + peak * g * snr) ** 2 for w in weights for g in nodes)
    jump = benefit if np.isfinite(max_power) else 0.0
    np.testing.assert_allclose(VALUE(optimum, problem), -probabilities @ least, rtol=0, atol=1e-3 + 3 / 192 * jump)


def test_one_block():
    # All of the energy, whatever the gain, and the return is that of the law.
    law, problem = gain_law(RayleighFading()), power_problem(0.0, 1, mean_power=2.0)
    expected = -float(law.mean(1 / (1 + 2 * law.gains)))
    np.testing.assert_allclose(VALUE(OPTIMUM(RayleighFading()), problem), expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(POWER(OPTIMUM(RayleighFading()), jnp.array([[0.1], [3.0]]), problem), 2)


@pytest.mark.parametrize("rho", [0.0, 0.5, -0.5, 0.9, 0.98])
def test_the_markov_chain_has_the_law_and_the_correlation_of_the_gains(rho):
    gains, stationary, transitions = (np.asarray(x, np.float64) for x in markov_law(GaussMarkovFading(rho)))
    assert np.all(transitions >= 0)
    rounding = len(gains) * 2.0**-24
    np.testing.assert_allclose(transitions.sum(1), 1, atol=rounding)
    np.testing.assert_allclose(stationary.sum(), 1, atol=rounding)
    # Midpoints in steps of 1/40: errors of order step^2 / 24.
    grid = 0.025**2 / 24
    np.testing.assert_allclose(stationary @ transitions, stationary, atol=grid)
    mean = stationary @ gains
    variance = stationary @ gains**2 - mean**2
    correlation = (stationary * gains @ transitions @ gains - mean**2) / variance
    np.testing.assert_allclose([mean, variance, correlation], [1, 1, rho**2], atol=4 * grid)


@pytest.mark.slow
def test_without_correlation_the_chain_and_the_law_give_one_optimum():
    problem, gains = power_problem(0.0, T), sample(RayleighFading(), 2)
    chain = returns(CausalOptimum(markov_law(GaussMarkovFading(0.0))), gains, problem)
    law = returns(causal_optimum(RayleighFading()), gains, problem)
    difference = chain - law
    # Two quadratures of one law, and the optimum is flat.
    assert abs(difference.mean()) <= 1e-5 + 3 * standard_error(difference)


def test_power_at_is_what_allocate_spends_first():
    optimum, problem = OPTIMUM(RayleighFading()), power_problem(0.0, T)
    gains = sample(RayleighFading(), 2)
    power_at = jax.jit(jax.vmap(lambda gain: optimum.power_at(gain, problem.energy, 0, problem)))
    np.testing.assert_allclose(POWER(optimum, gains, problem)[:, 0], power_at(gains[:, 0]), rtol=1e-5, atol=1e-6)


class Silent:
    """A law of a user's that does not say how its blocks depend on each other."""

    def sample(self, key, num_blocks):
        return jnp.full(num_blocks, RayleighFading().sample(key, 1)[0])


class Chained(Silent):
    dependence = "markov"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_optimum(GaussMarkovFading(0.99)), "deviation of .h. given the block before is 2.6"),
        (lambda: causal_optimum(JakesFading(0.1)), "fading is .*Jakes"),
        (lambda: causal_optimum(ShadowedFading(RayleighFading(), 4.0)), "fading is .*Shadowed"),
        (lambda: causal_optimum(Silent()), "Silent.dependence is None; it must be one of .*independent"),
        (lambda: causal_optimum(Chained()), "fading is .*Chained"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_laws_without_a_recursion(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_products_of_a_chain_of_gains_are_exact():
    def solve(optimum, gains, problem):
        return optimum.allocate(gains, problem), optimum.expected_return(problem)

    assert inexact_products(solve, OPTIMUM(GaussMarkovFading(RHO)), jnp.ones(4), power_problem(0.0, 4)) == []
