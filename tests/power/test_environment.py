"""Tests of the power-control environment: gymnax's protocol, rewards, what is observed, bad parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import ImperfectCSI, NoFading, RayleighFading
from megjax.numerics import squared_magnitude
from megjax.power import PowerControl, weighted_errors
from megjax.power.environment import observation_size, share_of_offset
from tests.checks import within_standard_error
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
BLOCKS, EPISODES = 5, 2048
WEIGHTS = np.array([2.0, 1.5, 1.0, 0.5, 0.0])
EQUAL = {"weights": np.ones((2, 2, BLOCKS)), "weight_grid_db": np.array([0.0, 10.0])}


@pytest.fixture(scope="module")
def env():
    return PowerControl(BLOCKS)


@pytest.fixture(scope="module")
def params(env):
    return env.make_params(snr_db=(0.0, 10.0), weights=WEIGHTS)


@pytest.fixture(scope="module")
def begin(env):
    """`begin(seed, params)`: 2,048 episodes."""
    run = jax.jit(jax.vmap(env.begin, (0, None)))
    return lambda seed, params: run(jax.random.split(jax.random.key(seed), EPISODES), params)


@pytest.fixture(scope="module")
def play(env):
    """`play(params, shares)`: observations, rewards, dones and states of one episode with these shares."""
    return functools.partial(play_episode, jax.jit(env.reset), jax.jit(env.step))


def play_episode(reset, step, params, shares):
    obs, state = reset(jax.random.key(0), params)
    seen, rewards, dones, states = [obs], [], [], [state]
    for i, share in enumerate(shares):
        obs, state, reward, done, *_ = step(jax.random.key(100 + i), state, jnp.array([share], jnp.float32), params)
        seen.append(obs)
        rewards.append(float(reward))
        dones.append(bool(done))
        states.append(state)
    return seen, rewards, dones, states


def test_an_episode_is_rewarded_with_the_weighted_errors_of_its_powers(env, params, play):
    shares = [0.3, 0.1, 0.7, 0.5, 0.2]
    seen, rewards, dones, states = play(params, shares)
    power, left = [], float(BLOCKS)
    for share in [*shares[:-1], 1.0]:  # the last block takes the rest
        power.append(share * left)
        left -= power[-1]
    episode = states[0].episode
    errors = weighted_errors(episode.problem, squared_magnitude(episode.gains), jnp.asarray(power))
    np.testing.assert_allclose(rewards, -np.asarray(errors), rtol=2e-5)
    assert dones == [False] * (BLOCKS - 1) + [True]
    assert sum(power) == pytest.approx(BLOCKS)
    assert int(states[-1].block) == 0 and float(states[-1].energy) == BLOCKS  # a new episode has begun
    assert not np.allclose(states[-1].episode.gains, episode.gains)
    for obs in seen:
        assert obs.shape == env.observation_space(params).shape == (observation_size(BLOCKS, 0),)
        assert np.all(np.isfinite(obs))


def test_shares_are_clipped_and_the_peak_holds(env, play):
    params = env.make_params(snr_db=(0.0, 0.0), max_power=1.5)
    _, _, _, states = play(params, [7.0, -1.0, 0.0, 0.0])
    np.testing.assert_allclose(states[-1].power, [1.5, 0, 0, 0, 0])
    last, _ = env.advance(states[-1], jnp.float32(0))
    np.testing.assert_allclose(last.power, [1.5, 0, 0, 0, 1.5])  # of the 3.5 that are left


def test_spaces_hold_what_they_describe(env, params):
    actions, observations = env.action_space(params), env.observation_space(params)
    sample = actions.sample(jax.random.key(0))
    assert sample.shape == (1,) and bool(actions.contains(sample)) and not bool(actions.contains(sample + 2))
    assert observations.sample(jax.random.key(1)).shape == observations.shape
    assert env.num_actions == 1 and env.name == "PowerControl"
    assert env.default_params.weights.shape == (1, 1, BLOCKS)


def test_snrs_and_weights_are_drawn_as_told(env, begin):
    table = np.stack([np.ones((2, BLOCKS)), [[4, 1, 0, 0, 0], [0, 0, 0, 1, 4]]]).astype(float)
    params = env.make_params(snr_db=(0.0, 10.0), weights=table, weight_grid_db=np.array([0.0, 10.0]))
    problem = begin(2, params).problem
    snr_db, weights = 10 * np.log10(np.asarray(problem.snr)), np.asarray(problem.weights)
    assert snr_db.min() >= -1e-4 and snr_db.max() <= 10 + 1e-4
    within_standard_error(snr_db, 5.0)
    np.testing.assert_allclose(weights.mean(1), 1, rtol=1e-5)
    equal = np.all(np.isclose(weights, 1, atol=1e-5), axis=1)
    within_standard_error(equal, 0.5)
    expected = np.interp(snr_db[~equal], [0, 10], [4, 0])  # of block 1, the sum being 5
    np.testing.assert_allclose(weights[~equal, 0], expected, rtol=1e-3, atol=1e-3)


def test_spread_weights_differ_between_episodes(env, begin):
    weights = np.log(np.asarray(begin(3, env.make_params(**EQUAL, weight_spread=0.5)).problem.weights))
    variance = np.square(weights - weights.mean(1, keepdims=True)).sum(1) / (BLOCKS - 1)
    within_standard_error(variance, 0.25)


def test_estimated_gains_count_their_error_as_noise_and_may_be_late(env):
    params = env.make_params(RayleighFading(), (5.0, 5.0), csi=ImperfectCSI(1.0, num_pilots=2, delay_blocks=1))
    episode = jax.jit(env.begin)(jax.random.key(4), params)
    power = jnp.array([2.0, 1.0, 0.5, 1.0, 0.5])
    noise = 10**-0.5 + np.asarray(power) / (1 + 2 * 10**0.5)
    expected = np.asarray(params.weights[0, 0]) / (1 + np.asarray(power * episode.received) / noise)
    np.testing.assert_allclose(env.errors(episode, power), expected, rtol=1e-5)
    np.testing.assert_array_equal(episode.known[1:], episode.received[:-1])
    assert not np.allclose(episode.received, squared_magnitude(episode.gains))


def test_history_is_of_the_past_only():
    env = PowerControl(BLOCKS, history=2)
    episode = jax.jit(env.begin)(jax.random.key(6), env.make_params())
    rows, log_gains = np.asarray(episode.features.fixed), np.log(np.asarray(episode.known) + 1e-4)
    np.testing.assert_allclose(rows[:, 0], log_gains, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[:, -2], [0, *log_gains[:-1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[:, -1], [0, 0, *log_gains[:-2]], rtol=1e-5, atol=1e-6)


def test_an_offset_of_zero_is_equal_power_at_equal_weights(env, begin):
    planned = begin(7, env.make_params(**EQUAL, snr_db=(3.0, 3.0))).features.share[0]
    left = BLOCKS - np.arange(BLOCKS)
    shares = share_of_offset(planned, jnp.zeros(BLOCKS))
    np.testing.assert_allclose(shares, 1 / left, rtol=1e-5)
    # u = 1 / (1 + (T - t - 1) exp(-a))
    shares = share_of_offset(planned, jnp.full(BLOCKS, 0.7))
    np.testing.assert_allclose(shares, 1 / (1 + (left - 1) * np.exp(-0.7)), rtol=1e-5)


def test_quality_is_paid_once_at_the_end(params):
    def quality(key, gains, power, snr_db):
        return 100 * power[0] + snr_db

    env = PowerControl(BLOCKS, quality=quality)
    _, rewards, _, states = play_episode(jax.jit(env.reset), jax.jit(env.step), params, [0.4, 0.5, 0.5, 0.5, 0.5])
    snr_db = 10 * np.log10(float(states[0].episode.problem.snr))
    assert rewards[:-1] == [0.0] * (BLOCKS - 1)
    assert rewards[-1] == pytest.approx(100 * 0.4 * BLOCKS + snr_db, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": np.ones(4)}, "weights' shape"),
        ({"weights": np.array([1.0, 1.0, np.nan, 1.0, 1.0])}, "weights"),
        ({"weights": np.zeros(5)}, "weights"),
        ({"weights": np.ones((2, 3, 5)), "weight_grid_db": np.array([0.0, 1.0])}, "weight_grid_db"),
        ({"weights": np.ones((1, 2, 5)), "weight_grid_db": np.array([1.0, 0.0])}, "weight_grid_db"),
        ({"snr_db": (5.0, 0.0)}, "snr_db"),
        ({"snr_db": (0.0, float("nan"))}, "snr_db"),
        ({"mean_power": 0.0}, "mean_power"),
        ({"max_power": -1.0}, "max_power"),
        ({"weight_spread": -0.1}, "weight_spread"),
    ],
)
def test_bad_parameters(env, options, message):
    with pytest.raises(ValueError, match=message):
        env.make_params(NoFading(), **options)


def test_bad_environments():
    with pytest.raises(ValueError, match="num_blocks is 0"):
        PowerControl(0)
    with pytest.raises(ValueError, match="history is -1"):
        PowerControl(4, history=-1)


def test_products_are_exact(env, params):
    def play(params, action):
        keys = jax.random.split(jax.random.key(0))
        return env.step(keys[0], env.reset(keys[1], params)[1], action, params)[:3]

    assert inexact_products(play, params, jnp.ones(1), gradient=True) == []
