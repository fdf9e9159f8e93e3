"""Tests of the Gymnasium adapters with the real library, and of stable-baselines3 on them."""

import functools
import warnings

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from megjax.power import PowerControl, static_power
from megjax.power.adapters import GymnasiumPowerControl, GymnasiumVectorPowerControl

pytestmark = pytest.mark.usefixtures("fast_compile")
T = 4
ENV = PowerControl(T)


@functools.cache
def make_params(weights=(1.0,) * T):
    return ENV.make_params(snr_db=(0.0, 10.0), weights=np.array(weights))


UNEQUAL = (4.0, 2.0, 1.0, 0.5)


def episode(env, actions, seed=None):
    """Observations, rewards, powers of one episode."""
    obs, _ = env.reset(seed=seed)
    rows, rewards, powers = [obs], [], []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(np.float32([action]))
        rows.append(obs)
        rewards.append(reward)
        powers.append(info["power"])
        assert not truncated
    assert terminated
    return np.stack(rows), np.array(rewards), np.array(powers), info["snr_db"]


@pytest.fixture(scope="module")
def single():
    return GymnasiumPowerControl(ENV, make_params())


@pytest.fixture(scope="module")
def weighted():
    return GymnasiumPowerControl(ENV, make_params(UNEQUAL))


@pytest.fixture(scope="module")
def vector():
    return GymnasiumVectorPowerControl(ENV, make_params(), 3)


def test_gymnasium_accepts_it(single):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|spec|normalized).*")
        check_env(single)


def test_action_zero_is_equal_power(single):
    rows, rewards, powers, snr_db = episode(single, [0.0] * T, seed=3)
    assert rows.dtype == np.float32 and rows.shape == (T + 1, *single.observation_space.shape)
    assert powers == pytest.approx(np.ones(T), rel=1e-5)
    gains = np.exp(rows[:T, 0]) - 1e-4  # the first feature is the gain's logarithm
    assert rewards == pytest.approx(-1 / (1 + gains * 10 ** (snr_db / 10)), rel=1e-4)


def test_action_zero_is_the_plan_of_the_weights(weighted):
    _, _, powers, snr_db = episode(weighted, [0.0] * T, seed=3)
    weights = make_params(UNEQUAL).weights[0, 0]
    plan = jax.jit(static_power)(
        make_params(UNEQUAL).table, weights / weights.mean(), 10 ** (snr_db / 10), jnp.float32(T)
    )
    floor = 0.05  # a twentieth of the share left is equal
    energy, expected = float(T), []
    for t in range(T):
        share = (1 - floor) * plan[t] / plan[t:].sum() + floor / (T - t)
        expected.append(energy * (share if t < T - 1 else 1.0))
        energy -= expected[-1]
    assert powers == pytest.approx(np.array(expected), rel=1e-3)
    assert powers[0] > 1.2 * powers[-1]


def test_action_is_the_log_odds_of_the_share(single):
    actions = [1.0, -2.0, 0.7, 5.0]
    _, _, powers, _ = episode(single, actions, seed=1)
    energy, expected = float(T), []
    for t, a in enumerate(actions):
        expected.append(energy / (1 + (T - t - 1) * np.exp(-a)))
        energy -= expected[-1]
    assert powers == pytest.approx(np.array(expected), rel=1e-4)
    assert powers.sum() == pytest.approx(T, rel=1e-5)


def test_seeds_decide_the_episodes(single):
    actions = [0.5] * T
    first, second = episode(single, actions, seed=7), episode(single, actions)
    again, other = episode(single, actions, seed=7), episode(single, actions, seed=8)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert np.array_equal(episode(single, actions, seed=7)[0], first[0])
    assert np.array_equal(episode(single, actions)[0], second[0])
    assert not np.allclose(first[0][:, 0], second[0][:, 0]) and not np.allclose(first[0][:, 0], other[0][:, 0])
    fresh = GymnasiumPowerControl(ENV, make_params(), seed=7)
    assert np.array_equal(fresh.reset()[0], first[0][0])


def test_vector_of_environments_is_the_environment(vector):
    obs, infos = vector.reset(seed=5)
    assert vector.observation_space.contains(obs) and infos["snr_db"].shape == (3,)
    first = obs
    rng = np.random.default_rng(0)
    states = jax.jit(jax.vmap(ENV.reset, (0, None)))(vector_keys(vector), make_params())[1]
    step = jax.jit(jax.vmap(lambda state, share: ENV.step_env(None, state, share, None)))
    for t in range(T):
        actions = rng.standard_normal((3, 1)).astype(np.float32)
        obs, rewards, terminations, truncations, infos = vector.step(actions)
        left = T - t - 1
        share = 1 / (1 + left * np.exp(-actions[:, 0]))
        expected, states, reward, _, _ = step(states, jnp.asarray(share))
        assert rewards == pytest.approx(np.asarray(reward), rel=1e-4)
        assert vector.observation_space.contains(obs) and rewards.dtype == np.float32
        assert not truncations.any() and terminations.all() == (t == T - 1)
        if t < T - 1:
            assert obs == pytest.approx(np.asarray(expected), rel=1e-3, abs=1e-4)
            assert infos["power"] == pytest.approx(np.asarray(states.power[:, t]), rel=1e-4)
            assert "final_obs" not in infos
    assert np.stack(list(infos["final_obs"])) == pytest.approx(np.asarray(expected), rel=1e-3, abs=1e-3)
    assert infos["_final_obs"].all() and infos["final_info"]["power"].shape == (3,)
    assert not np.allclose(obs, first)  # the next episodes have begun
    after, *_ = vector.step(np.zeros((3, 1), np.float32))
    assert not np.allclose(after, obs)
    assert np.array_equal(vector.reset(seed=5)[0], first)


def vector_keys(vector):
    return jax.random.split(jax.random.fold_in(vector._episodes.key, vector._episodes.count), 3)


@pytest.mark.parametrize("mode", [mode.name for mode in AutoresetMode])
def test_gymnasium_wrappers_in_every_autoreset_mode(mode):
    env = GymnasiumVectorPowerControl(ENV, make_params(), 3, autoreset_mode=mode)
    assert env.metadata["autoreset_mode"] is AutoresetMode[mode]
    assert env.action_space.shape == (3, 1) and env.single_action_space.shape == (1,)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(gymnasium.wrappers.vector.ClipAction(env))
    if mode == "NEXT_STEP":
        wrapped = gymnasium.wrappers.vector.NormalizeObservation(wrapped)
    actions = np.zeros((3, 1), np.float32)
    for _ in range(2):
        wrapped.reset(seed=0)
        total = np.zeros(3)
        for t in range(T):
            _, rewards, terminations, _, infos = wrapped.step(actions)
            total += rewards
            assert terminations.all() == (t == T - 1)
        statistics = infos.get("episode") or infos["final_info"]["episode"]
        assert statistics["r"] == pytest.approx(total, rel=1e-5)
        assert (statistics["l"] == T).all()
    if mode == "DISABLED":
        with pytest.raises(gymnasium.error.ResetNeeded):
            wrapped.step(actions)
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": np.array([True, False, True])})
        first, _ = wrapped.reset(seed=0, options={"reset_mask": np.ones(3, bool)})
    else:
        first, rewards, terminations, _, _ = wrapped.step(actions)
        assert not terminations.any() and (rewards == 0).all() == (mode == "NEXT_STEP")
    assert np.isfinite(first).all()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked", "usual_promotion")
def test_gymnax_wrappers():
    """LogWrapper, FlattenObservationWrapper, the dm_env wrapper, and the environment alone, with the real package."""
    wrappers = pytest.importorskip("gymnax.wrappers", reason="holds JAX below 0.12")
    params, keys = make_params(), jax.random.split(jax.random.key(3), T)
    actions = jnp.array([[0.3], [0.2], [0.9], [0.1]])
    alone = ENV.reset(keys[0], params)
    logged = wrappers.LogWrapper(wrappers.FlattenObservationWrapper(ENV))
    obs, state = logged.reset(keys[0], params)
    stepped = wrappers.GymnaxToDmEnvWrapper(ENV)
    at = stepped.reset(keys[0], params)
    total = 0.0
    for key, action in zip(keys, actions, strict=True):
        obs, state, reward, terminated, truncated, info = logged.step(key, state, action, params)
        alone = jax.jit(ENV.step)(key, alone[1], action, params)
        at = stepped.step(key, at, action, params)
        total += float(reward)
        np.testing.assert_allclose(obs, alone[0], rtol=1e-5)
        np.testing.assert_allclose(at.observation, obs, rtol=1e-5)
        assert not truncated and float(at.discount) == 1 - terminated
    assert terminated and info["terminated"] and not info["truncated"] and info["returned_episode"]
    assert float(info["returned_episode_returns"]) == pytest.approx(total, rel=1e-5)
    assert int(info["returned_episode_lengths"]) == T
    fresh, _ = ENV.reset(jax.random.split(keys[-1])[1], params)
    np.testing.assert_allclose(obs, fresh, rtol=1e-5)
    assert not np.allclose(info["final_observation"], obs)
    assert float(alone[1].energy) == float(alone[1].episode.problem.energy)


def test_parameters_are_optional_as_in_gymnax():
    obs, state = jax.jit(ENV.reset)(jax.random.key(0))
    after = jax.jit(ENV.step)(jax.random.key(1), state, jnp.float32(0.5))
    assert obs.shape == after[0].shape == ENV.observation_space().shape
    np.testing.assert_array_equal(ENV.observe(jax.random.key(2), state), obs)


def test_bad_use_is_told(single, vector):
    fresh = GymnasiumPowerControl(ENV, make_params())
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        fresh.step(np.zeros(1, np.float32))
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        GymnasiumVectorPowerControl(ENV, make_params(), 2).step(np.zeros((2, 1), np.float32))
    episode(single, [0.0] * T, seed=0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        single.step(np.zeros(1, np.float32))
    single.reset(seed=0)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        single.step(np.float32([np.nan]))
    with pytest.raises(ValueError, match=r"action.*\(3, 1\)"):
        vector.step(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="options"):
        single.reset(options={"snr_db": 3})
    with pytest.raises(ValueError, match="num_envs"):
        GymnasiumVectorPowerControl(ENV, make_params(), 0)
    with pytest.raises(ValueError, match="autoreset_mode is 'later'; it must be one of .*NEXT_STEP"):
        GymnasiumVectorPowerControl(ENV, make_params(), 2, autoreset_mode="later")


def test_stable_baselines3_monitors_it():
    from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

    from megjax.power.stable_baselines import StableBaselinesPowerControl

    env = StableBaselinesPowerControl(ENV, make_params(), 2)
    wrapped = VecNormalize(VecMonitor(env), norm_reward=False)
    wrapped.seed(5)
    first = wrapped.reset()
    assert first.shape == (2, ENV.observation_space().shape[0]) and env.reset_infos[0]["snr_db"] <= 10
    total = np.zeros(2)
    for _ in range(T):
        obs, rewards, dones, infos = wrapped.step(np.zeros((2, 1), np.float32))
        total += rewards
    assert dones.all() and env.get_attr("num_envs") == [2, 2]
    for i, info in enumerate(infos):
        assert info["episode"]["r"] == pytest.approx(total[i], abs=1e-5) and info["episode"]["l"] == T
        assert not info["TimeLimit.truncated"] and info["terminal_observation"].shape == obs[i].shape
        assert not np.allclose(info["terminal_observation"], obs[i])
    for refused in (lambda: env.set_attr("num_envs", 3), lambda: env.env_method("reset")):
        with pytest.raises(NotImplementedError, match="one compiled program"):
            refused()


@pytest.mark.slow
def test_stable_baselines3_trains_on_it():
    from eval.peers.sb3_power import make_agent

    agent = make_agent(ENV, make_params(), num_envs=8, num_steps=2 * T, epochs=2, minibatches=4, hidden=(8,))
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(2 * 8 * 2 * T)
    assert agent.num_timesteps == 2 * 8 * 2 * T
    assert any(bool((a != b.detach()).any()) for a, b in zip(before, agent.policy.parameters(), strict=True))
    starts = agent.rollout_buffer.episode_starts
    assert np.array_equal(starts, np.tile(np.arange(2 * T)[:, None] % T == 0, (1, 8)))  # episodes of T steps
    assert (agent.rollout_buffer.rewards < 0).all()
