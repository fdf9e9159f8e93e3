"""Tests of PPO: environments of known value, exact resumption, vmapping, policy files."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megjax.channel import NoFading
from megjax.power import (
    PPO,
    EqualPower,
    Hyperparameters,
    LearnedPower,
    PowerControl,
    PPOConfig,
    make_ppo,
    power_problem,
)
from megjax.power.actor_critic import WEIGHTS_NAME, ActorCriticConfig, blank_policy
from megjax.power.laws import gain_law, load_table
from megjax.power.recipe import PRESETS, train_power

SMALL = PPOConfig(num_envs=32, num_updates=6, minibatches=2, epochs=2, hidden=(8,))


class CoinFading:
    """Every gain is 0 or 2 with probability one half."""

    def sample(self, key, num_blocks):
        return jnp.sqrt(2.0) * jax.random.bernoulli(key, 0.5, (num_blocks,)).astype(jnp.complex64)


def train(config, env, params, seed=0):
    """The trained policy and the state."""
    state, metrics = jax.jit(make_ppo(config, env, params))(jax.random.key(seed))
    return PPO(config, env).policy(state, params), state, metrics


@pytest.fixture(scope="module")
def small():
    env = PowerControl(4)
    params = env.make_params()
    ppo = PPO(SMALL, env)
    return env, params, ppo, jax.jit(ppo.update)


def test_it_learns_to_wait_for_a_gain():
    """Two blocks of gain 0 or 2: all of the energy in the first if it is 2 and the second may be 0, none if it is 0.

    With energy 2 at 0 dB and g_1 = 2 the expected error is 1/(1 + 2 p) + (1 + 1/(1 + 2 (2 - p))) / 2. It is least where
    (1 + 2 (2 - p))^2 = (1 + 2 p)^2 / 2, p = (5 - 1/sqrt 2) / (2 + sqrt 2).
    """
    env = PowerControl(2)
    params = env.make_params(CoinFading(), (0.0, 0.0))
    policy, _, _ = train(PPOConfig(num_envs=1024, num_updates=60, minibatches=4, hidden=(32,)), env, params)
    power = jax.jit(policy.allocate)
    problem = power_problem(0.0, 2)
    best = (5 - 1 / np.sqrt(2)) / (2 + np.sqrt(2))
    assert power(jnp.array([2.0, 0.0]), problem)[0] == pytest.approx(best, abs=0.1)
    assert power(jnp.array([0.0, 0.0]), problem)[0] < 0.05

    def error(first_good, first_bad):
        second = lambda left: 0.5 * (1 + 1 / (1 + 2 * left))  # noqa: E731
        return 0.5 * (1 / (1 + 2 * first_good) + second(2 - first_good)) + 0.5 * (1 + second(2 - first_bad))

    found = error(*(float(power(jnp.array([g, 0.0]), problem)[0]) for g in (2.0, 0.0)))
    assert error(1.0, 1.0) - found > 0.97 * (error(1.0, 1.0) - error(best, 0.0))


def test_it_finds_the_loads_of_unequal_blocks_by_itself():
    """No fading, weights 4 and 1, plan for equal weights: the optimum is (1 + p_1) = 2 (1 + p_2), p = (5/3, 1/3)."""
    env = PowerControl(2, quality=lambda key, gains, power, snr_db: -jnp.sum(jnp.array([4.0, 1.0]) / (1 + power)))
    params = env.make_params(NoFading(), (0.0, 0.0))
    policy, _, _ = train(PPOConfig(num_envs=256, num_updates=80, minibatches=4, hidden=(16,)), env, params)
    power = policy.allocate(jnp.ones(2), power_problem(0.0, 2))
    np.testing.assert_allclose(power, [5 / 3, 1 / 3], atol=0.05)


def test_it_obeys_a_reward_at_the_end():
    """A quality that wants 0.6 in the first of three blocks and 1.8 in the second."""
    wanted = jnp.array([0.6, 1.8, 0.6])
    env = PowerControl(3, quality=lambda key, gains, power, snr_db: -jnp.sum(jnp.square(power - wanted)))
    params = env.make_params(NoFading(), (0.0, 0.0))
    policy, _, metrics = train(PPOConfig(num_envs=256, num_updates=80, minibatches=4, hidden=(16,)), env, params)
    np.testing.assert_allclose(policy.allocate(jnp.ones(3), power_problem(0.0, 3)), wanted, atol=0.06)
    assert metrics["return"][-1] > metrics["return"][0]


def test_updates_are_finite_move_and_trace_once(small):
    env, params, ppo, _ = small
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda state: ppo.update(state, params), n=1))
    state = ppo.init(jax.random.key(0))
    first, _ = update(state)
    chex.assert_trees_all_equal(first.params, state.params)  # only the observations were measured
    second, metrics = update(first)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), second.params, first.params)
    assert all(change > 0 for change in jax.tree.leaves(moved))
    assert int(second.step) == 2


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    recipe = PRESETS["tiny"]
    env, params = recipe.environment()
    whole = train_power(recipe, env, params, tmp_path / "whole")

    class Killed(Exception):
        pass

    saves = []

    def kill(state):
        saves.append(int(state.step))
        raise Killed

    often = dataclasses.replace(recipe, checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        train_power(often, env, params, tmp_path / "cut", on_checkpoint=kill)
    assert saves == [2]
    resumed = train_power(often, env, params, tmp_path / "cut")
    chex.assert_trees_all_equal(resumed.state, whole.state)
    np.testing.assert_array_equal(resumed.mean, whole.mean)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="seed"):
        train_power(dataclasses.replace(recipe, seed=1), env, params, tmp_path / "cut")


def test_it_vmaps_over_seeds_and_hyperparameters(small):
    env, params, _, _ = small
    run = make_ppo(dataclasses.replace(SMALL, num_updates=3), env, params)
    keys = jax.random.split(jax.random.key(1), 2)
    both, _ = jax.jit(jax.vmap(lambda key: run(key)))(keys)
    alone, _ = jax.jit(run)(jax.random.split(jax.random.key(1), 2)[1])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], both.params), alone.params, rtol=1e-3, atol=1e-4)
    rates = Hyperparameters(learning_rate=jnp.array([0.0, 1e-2]))
    axes = Hyperparameters(*(0 if name == "learning_rate" else None for name in Hyperparameters._fields))
    swept, _ = jax.jit(jax.vmap(lambda h: run(jax.random.key(2), params, h), (axes,)))(rates)
    still, moved = (jax.tree.map(lambda x, i=i: x[i], swept.params) for i in range(2))
    start = jax.jit(PPO(SMALL, env).init)(jax.random.key(2)).params
    chex.assert_trees_all_equal(still, start)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (moved, start)), strict=True)) > 0


def test_an_untrained_policy_is_equal_power_and_causal(small):
    env, params, ppo, _ = small
    policy = dataclasses.replace(
        blank_policy(ppo.network), table=load_table(gain_law(params.fading)), std=jnp.ones(policy_size(ppo))
    )
    gains, problem = jax.random.exponential(jax.random.key(3), (4,)), power_problem(5.0, 4)
    np.testing.assert_allclose(policy.allocate(gains, problem), EqualPower().allocate(gains, problem), rtol=1e-4)
    state = ppo.init(jax.random.key(4))
    stirred = jax.tree.map(lambda x: x + 0.3, state.params)
    acting = ppo.policy(state._replace(params=stirred), params)
    power, other = (acting.allocate(g, problem) for g in (gains, gains.at[2:].multiply(3.0)))
    np.testing.assert_array_equal(power[:2], other[:2])
    assert not np.allclose(power[2], other[2])
    assert float(power.sum()) == pytest.approx(4.0, rel=1e-5)


def policy_size(ppo):
    return ppo.env.observation_space().shape[0]


def test_a_policy_goes_on_from_another(small):
    env, params, ppo, update = small
    state, _ = update(ppo.init(jax.random.key(5)), params)
    policy = ppo.policy(state, params)
    again = ppo.policy(ppo.start_from(ppo.init(jax.random.key(6)), policy), params)
    chex.assert_trees_all_equal(again.state, policy.state)
    np.testing.assert_allclose(again.std, policy.std, rtol=1e-5)
    with pytest.raises(ValueError, match="start"):
        ppo.start_from(state, blank_policy(ActorCriticConfig(5, hidden=(8,))))


@pytest.fixture
def saved(small, tmp_path):
    _, params, ppo, _ = small
    policy = ppo.policy(ppo.init(jax.random.key(7)), params)
    policy.save_pretrained(tmp_path / "policy")
    return policy, tmp_path / "policy"


def test_files_bring_the_same_policy(saved):
    policy, folder = saved
    loaded = LearnedPower.from_pretrained(folder, num_blocks=4)
    gains, problem = jnp.array([0.1, 2.0, 0.7, 1.0]), power_problem(0.0, 4)
    np.testing.assert_array_equal(loaded.allocate(gains, problem), policy.allocate(gains, problem))


def test_a_policy_for_another_environment_is_refused(saved):
    policy, folder = saved
    with pytest.raises(ValueError, match="num_blocks is 4"):
        LearnedPower.from_pretrained(folder, num_blocks=16)
    with pytest.raises(ValueError, match=r"must have shape \(4,\)"):
        policy.allocate(jnp.ones(5), power_problem(0.0, 5))
    with pytest.raises(ValueError, match="power policy is"):
        LearnedPower.from_pretrained(folder / "nowhere")


def test_damaged_files_are_refused(saved):
    _, folder = saved
    path = folder / WEIGHTS_NAME
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("kernel"))
    wrong = {
        "is missing": {k: v for k, v in tensors.items() if k != name},
        "is unknown": tensors | {"extra": np.ones(2, np.float32)},
        "has shape": tensors | {name: np.ones((2, 2), np.float32)},
        "not finite": tensors | {name: tensors[name] * np.nan},
        "not positive": tensors | {"std": 0 * tensors["std"]},
    }
    for message, bad in wrong.items():
        save_file(bad, path)
        with pytest.raises(ValueError, match=message):
            LearnedPower.from_pretrained(folder)
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LearnedPower.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 10, "minibatches": 3}, "minibatches"),
        ({"num_envs": 0}, "num_envs"),
        ({"num_updates": 1}, "num_updates"),
        ({"final_clip": 2.0}, "final_clip"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"hidden": ()}, "hidden"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_one_block_leaves_nothing_to_learn():
    with pytest.raises(ValueError, match="num_blocks is 1"):
        PPO(SMALL, PowerControl(1))
