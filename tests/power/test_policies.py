"""Tests of the power policies: budgets, causality, optimality on every transmission, and hand-computed powers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import GaussMarkovFading, NakagamiFading, RayleighFading
from megjax.power import (
    POLICIES,
    ChannelInversion,
    Clairvoyant,
    ClairvoyantWaterfilling,
    GainLaw,
    LoadedPower,
    Policy,
    Waterfilling,
    check_policy,
    make_policy,
    power_problem,
)
from megjax.power.problem import check_gains, pay
from megjax.units import check_snr_db
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
T, EPISODES = 16, 256
ROUNDING = 2.0**-23
LOADS = np.linspace(2, 0.5, T).astype(np.float32)
UNEQUAL = np.geomspace(4, 0.1, T)
POWER = jax.jit(jax.vmap(lambda policy, gains, problem: policy.allocate(gains, problem), (None, 0, None)))
ONE = jax.jit(lambda policy, gains, problem: policy.allocate(gains, problem))
NAMES = ["loaded", *(name for name in POLICIES.names if name != "codec")]
CLAIRVOYANT = ["waterfilling_clairvoyant", "clairvoyant"]


@functools.cache
def make(name):
    return LoadedPower(jnp.asarray(LOADS)) if name == "loaded" else make_policy(name, RayleighFading())


PROBLEMS = {
    "equal": {"snr_db": 0.0},
    "unequal": {"snr_db": 5.0, "weights": UNEQUAL},
    "peak": {"snr_db": 10.0, "weights": UNEQUAL, "max_power": 1.5},
    "low": {"snr_db": -10.0, "max_power": 4.0},
    "unspendable": {"snr_db": 0.0, "max_power": 0.5},
}


@functools.cache
def given(problem):
    return power_problem(num_blocks=T, **PROBLEMS[problem])


@functools.cache
def rayleigh_gains():
    """Gains [episodes t]; the last transmissions have blocks of no gain at all, one of them no others."""
    gains = np.array(jax.random.exponential(jax.random.key(1), (EPISODES, T)))
    gains[-3, ::3], gains[-2, 0], gains[-1] = 0, 0, 0
    return jnp.asarray(gains)


@functools.cache
def powers(name, problem):
    return np.asarray(POWER(make(name), rayleigh_gains(), given(problem)), np.float64)


def received(problem, power):
    """p g snr [episodes t], float64."""
    return power * np.asarray(rayleigh_gains(), np.float64) * float(given(problem).snr)


def cost(problem, power):
    """sum_t w_t / (1 + p_t g_t snr) [episodes], float64."""
    return (np.asarray(given(problem).weights, np.float64) / (1 + received(problem, power))).sum(1)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_keeps_the_energy_and_the_peak(name, problem):
    power, budget = powers(name, problem), given(problem)
    assert isinstance(make(name), Policy)
    assert power.shape == (EPISODES, T) and np.all(np.isfinite(power)) and np.all(power >= 0)
    assert np.all(power <= float(budget.max_power))
    # One rounding a block.
    assert np.all(power.sum(1) <= float(budget.energy) * (1 + T * ROUNDING))


@pytest.mark.parametrize("problem", ["equal", "unequal"])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_peak_all_energy_is_spent(name, problem):
    np.testing.assert_allclose(powers(name, problem)[:-1].sum(1), T, rtol=T * ROUNDING)


@pytest.mark.parametrize("name", CLAIRVOYANT)
@pytest.mark.parametrize("problem", ["peak", "low"])
def test_the_clairvoyant_spend_all_energy_that_fits_under_the_peak(name, problem):
    # All but the transmissions with blocks of no gain.
    np.testing.assert_allclose(powers(name, problem)[:-3].sum(1), T, rtol=T * ROUNDING)


@pytest.mark.parametrize("problem", ["equal", "peak"])
@pytest.mark.parametrize("name", NAMES)
def test_causal_policies_do_not_look_ahead(name, problem):
    gains = np.tile(np.asarray(rayleigh_gains()[0]), (EPISODES, 1))
    later = np.arange(T)[None] > np.arange(T - 1)[:, None]
    gains[: T - 1] = np.where(later, np.asarray(rayleigh_gains()[1 : 1 + 1]), gains[: T - 1])
    power = np.asarray(POWER(make(name), jnp.asarray(gains), given(problem)))
    same = [np.array_equal(power[block, : block + 1], power[-1, : block + 1]) for block in range(T - 1)]
    assert make(name).causal == (name not in CLAIRVOYANT)
    assert all(same) if make(name).causal else not all(same)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_clairvoyant_is_best_on_every_transmission(problem):
    best = cost(problem, powers("clairvoyant", problem))
    for name in NAMES:
        assert np.all(best <= cost(problem, powers(name, problem)) * (1 + T * ROUNDING)), name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_clairvoyant_waterfilling_has_the_most_capacity(problem):
    best = np.log1p(received(problem, powers("waterfilling_clairvoyant", problem))).sum(1)
    for name in NAMES:
        assert np.all(best * (1 + T * ROUNDING) >= np.log1p(received(problem, powers(name, problem))).sum(1)), name


def test_hand_computed_waterfilling_over_known_gains():
    # Floors 1, none, 1/2, 2: the level is (4 + 3.5) / 3 without a peak, and 3 with one of 1.5.
    gains = jnp.array([1.0, 0.0, 2.0, 0.5])
    free, peak = power_problem(0.0, 4), power_problem(0.0, 4, max_power=1.5)
    np.testing.assert_allclose(ONE(ClairvoyantWaterfilling(), gains, free), [1.5, 0, 2, 0.5], rtol=4 * ROUNDING)
    np.testing.assert_allclose(ONE(ClairvoyantWaterfilling(), gains, peak), [1.5, 0, 1.5, 1], rtol=4 * ROUNDING)
    # What the others cannot take goes to a block in a fade so deep that rounding hides its power in the level.
    deep = jnp.array([1.0, 1e-12, 2.0, 0.0])
    np.testing.assert_allclose(ONE(ClairvoyantWaterfilling(), deep, peak), [1.5, 1, 1.5, 0], rtol=4 * ROUNDING)


def test_hand_computed_clairvoyant():
    # g snr = 1, weights 4 and 1: p = (2 s - 1, s - 1) with 3 s - 2 = 2; a block without gain gets nothing.
    problem = power_problem(0.0, 3, np.array([4.0, 1.0, 9.0]), mean_power=2 / 3)
    power = ONE(Clairvoyant(), jnp.array([1.0, 1.0, 0.0]), problem)
    np.testing.assert_allclose(power, [5 / 3, 1 / 3, 0], rtol=1e-5)


@pytest.mark.parametrize("probability", [0.25, 0.5, 0.75])
def test_waterfilling_when_many_blocks_have_no_gain(probability):
    # E(level - 1)+ = (1 - P) (level - 1) = 1: power 1 / (1 - P) wherever there is a gain.
    law = GainLaw(jnp.array([0.0, 1.0]), jnp.array([probability, 1 - probability]))
    power = ONE(Waterfilling(law), jnp.array([0.0, 1.0, 0.0, 0.0]), power_problem(0.0, 4))
    np.testing.assert_allclose(power[:3], [0, 1 / (1 - probability), 0], rtol=4 * ROUNDING)
    np.testing.assert_allclose(power.sum(), 4, rtol=4 * ROUNDING)


def test_hand_computed_inversion():
    # Always sent, c = 1 / E[1 / g] = 0.8 and the error 1 / 1.8; sent at g = 2 only, c = 4 and it is (1 + 1 / 5) / 2.
    law = GainLaw(jnp.array([0.5, 2.0]), jnp.array([0.5, 0.5]))
    gains = jnp.array([0.5, 2.0, 2.0, 0.5])
    np.testing.assert_allclose(
        ONE(ChannelInversion(law), gains, power_problem(0.0, 4)), [1.6, 0.4, 0.4, 1.6], rtol=1e-6
    )
    # With no gain half of the time it is truncated: c = 2 E.
    law = GainLaw(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]))
    gains = jnp.array([0.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(ONE(ChannelInversion(law), gains, power_problem(0.0, 4)), [0, 2, 0, 2], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ppo"])
def test_one_block_takes_all(name):
    policy = LoadedPower(jnp.ones(1)) if name == "loaded" else make(name)
    for peak, expected in ((np.inf, 2.0), (1.5, 1.5)):
        power = ONE(policy, jnp.array([0.7]), power_problem(0.0, 1, mean_power=2.0, max_power=peak))
        np.testing.assert_allclose(power, [expected], rtol=4 * ROUNDING)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "dp" else []) for n in NAMES])
def test_jit_and_vmap_agree_with_the_loop(name):
    looped = np.stack([ONE(make(name), gains, given("peak")) for gains in rayleigh_gains()[:4]])
    np.testing.assert_allclose(powers(name, "peak")[:4], looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_gains(bad):
    with pytest.raises(ValueError, match="gains is .*finite and 0 or more"):
        check_gains(np.array([1.0, bad, 1.0]))
    with pytest.raises(ValueError, match="gains' shape is"):
        check_gains(np.ones(T - 1), given("equal"))


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_checks_the_gains(name):
    num_blocks = T if name in ("loaded", "ppo") else 1
    with pytest.raises(ValueError, match="(?s)gains is .*finite and 0 or more"):
        make(name).allocate(jnp.full(num_blocks, jnp.nan), power_problem(0.0, num_blocks))
    with pytest.raises(ValueError, match="gains' shape is|do not fit"):
        jax.eval_shape(make(name).allocate, jnp.ones(T - 1), given("equal"))


def test_a_load_of_another_length():
    with pytest.raises(ValueError, match="load has shape"):
        LoadedPower(jnp.ones(3)).allocate(jnp.ones(T), given("equal"))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_exact(name):
    def allocate(policy, *given):
        return policy.allocate(*given)

    assert inexact_products(allocate, make(name), rayleigh_gains()[0], given("unequal"), gradient=True) == []


class Own:
    """A policy of a user's: `rule(gains, problem)`."""

    def __init__(self, rule, causal=True):
        self.rule, self.causal = rule, causal

    def allocate(self, gains, problem):
        return self.rule(gains, problem)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Own(lambda g, p: jnp.full(g.shape, 2.5)), "Own.allocate's energy at -10 dB is .*; it must be at most 4"),
        (Own(lambda g, p: 0.5 * p.energy * g / g.sum()), "Own.causal is True; it must be False"),
        (Own(lambda g, p: 1 - g), "smallest power is .*; it must be 0 or more"),
        (Own(lambda g, p: g / 0.0), "powers is .*; it must be finite"),
        (Own(lambda g, p: jnp.where(jnp.arange(4) == 0, p.energy, 0.0)), "largest power is .*; it must be <= 3"),
        (Own(lambda g, p: jnp.sum(g)), "shape is .*; it must be \\(4,\\)"),
        (Own(lambda g, p: jnp.zeros(4), causal=None), "Own.causal is None; it must be True or False"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_policies_that_break_their_contract(policy, message):
    with pytest.raises(ValueError, match=message):
        check_policy(policy, RayleighFading(), 4, max_power=3.0)


def test_the_contract_of_a_policy_can_be_kept():
    check_policy(Own(lambda g, p: jnp.minimum(p.energy * g / g.sum(), p.max_power), causal=False), RayleighFading(), 4)
    check_policy(make_policy("waterfilling", RayleighFading(), 4), RayleighFading(), 4, max_power=2.0)


def test_a_problem_is_made_under_vmap_and_jit():
    levels = jnp.array([0.0, 3.0])
    problems = jax.jit(jax.vmap(lambda x: power_problem(x, 3, weights=x * jnp.ones(3), max_power=x)))(levels)
    for i, level in enumerate((0.0, 3.0)):
        one = power_problem(level, 3)
        np.testing.assert_allclose(problems.snr[i], one.snr, rtol=1e-6)
        np.testing.assert_allclose(problems.weights[i], level)
        assert problems.energy[i] == 3 and problems.max_power[i] == level
    with pytest.raises(ValueError, match="weights' shape is .*3"):
        jax.jit(lambda x: power_problem(0.0, 3, weights=x))(jnp.ones(4))


@pytest.mark.usefixtures("unchecked")
def test_traced_snrs_where_they_are_checked():
    with pytest.raises(ValueError, match="snr_db is traced, by jit, vmap or grad"):
        jax.jit(lambda x: check_snr_db(x))(1.0)


@pytest.mark.parametrize("name", ["dp", "static", "waterfilling"])
def test_policies_are_made_for_one_law(name):
    law = {"dp": GaussMarkovFading}.get(name, NakagamiFading)
    leaf = "rho" if name == "dp" else "m"
    with pytest.raises(ValueError, match=f"{law.__name__}.{leaf} has shape .*; tables are made for one law"):
        make_policy(name, law(jnp.array([0.5, 0.6])), 4)
    with pytest.raises(ValueError, match=f"{law.__name__}.{leaf} is traced"):
        jax.jit(lambda x: make_policy(name, law(x), 4).causal)(0.7)


def test_a_block_pays_for_what_it_wants_up_to_the_peak():
    assert pay(jnp.float32(3), jnp.float32(2), jnp.inf) == (1, 2)
    assert pay(jnp.float32(3), jnp.float32(2), jnp.float32(0.5)) == (2.5, 0.5)
