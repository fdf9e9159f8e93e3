"""Tests of PPO: one small training's updates, exact resumption, vmapping, policy files."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megjax.power import (
    PPO,
    EnvParams,
    EqualPower,
    Hyperparameters,
    LearnedPower,
    PowerControl,
    PPOConfig,
    make_ppo,
    power_problem,
)
from megjax.power.actor_critic import WEIGHTS_NAME, ActorCriticConfig, blank_policy
from megjax.power.recipe import PRESETS, train_power
from tests.checks import assert_equal_trees
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL = PPOConfig(num_envs=32, num_updates=3, minibatches=2, epochs=2, hidden=(8,))
ALLOCATE = jax.jit(lambda policy, gains, problem: policy.allocate(gains, problem))


class Small(NamedTuple):
    """A small training: `init` and `update` are compiled, and `update` may be traced once only."""

    env: PowerControl
    params: EnvParams
    ppo: PPO
    init: Callable
    update: Callable


@pytest.fixture(scope="module")
def small():
    env = PowerControl(4)
    ppo = PPO(SMALL, env)
    update = jax.jit(chex.assert_max_traces(lambda state, params: ppo.update(state, params), n=1))
    return Small(env, env.make_params(), ppo, jax.jit(ppo.init), update)


@pytest.fixture(scope="module")
def trained(small):
    """The state after three updates from key 1."""
    state = small.init(jax.random.key(1), Hyperparameters())
    for _ in range(3):
        state, _ = small.update(state, small.params)
    return state


def test_updates_are_finite_and_move(small):
    state = small.init(jax.random.key(0), Hyperparameters())
    first, _ = small.update(state, small.params)
    assert_equal_trees(first.params, state.params)  # only the observations were measured
    second, metrics = small.update(first, small.params)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), second.params, first.params)
    assert all(change > 0 for change in jax.tree.leaves(moved))
    assert int(second.step) == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(unchecked, tmp_path):
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
    assert_equal_trees(resumed.state, whole.state)
    np.testing.assert_array_equal(resumed.mean, whole.mean)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="seed"):
        train_power(dataclasses.replace(recipe, seed=1), env, params, tmp_path / "cut")


@pytest.mark.slow
def test_it_vmaps_over_seeds_and_hyperparameters(unchecked, small, trained):
    run = make_ppo(SMALL, small.env, small.params)
    keys = jnp.stack([jax.random.key(seed) for seed in (0, 1, 1)])
    rates = Hyperparameters(learning_rate=jnp.array([6e-3, 6e-3, 0.0]))
    axes = Hyperparameters(*(0 if name == "learning_rate" else None for name in Hyperparameters._fields))
    together, _ = jax.jit(jax.vmap(lambda key, h: run(key, small.params, h), (0, axes)))(keys, rates)
    other, same, still = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), together.params) for i in range(3))
    assert_equal_trees(still, small.init(jax.random.key(1), Hyperparameters()).params)
    chex.assert_trees_all_close(same, trained.params, rtol=1e-3, atol=1e-4)
    for moved in (other, trained.params):
        assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (moved, still)), strict=True)) > 0.01


def test_an_untrained_policy_is_equal_power(small):
    blank = blank_policy(small.ppo.network)
    policy = dataclasses.replace(blank, table=small.params.table)
    gains, problem = jax.random.exponential(jax.random.key(3), (4,)), power_problem(5.0, 4)
    np.testing.assert_allclose(ALLOCATE(policy, gains, problem), ALLOCATE(EqualPower(), gains, problem), rtol=1e-4)


def test_a_policy_is_causal_and_spends_all(small, trained):
    gains, problem = jax.random.exponential(jax.random.key(3), (4,)), power_problem(5.0, 4)
    stirred = trained._replace(params=jax.tree.map(lambda x: x + 0.3, trained.params))
    policy = small.ppo.policy(stirred, small.params)
    power, other = (ALLOCATE(policy, g, problem) for g in (gains, gains.at[2:].multiply(3.0)))
    np.testing.assert_array_equal(power[:2], other[:2])
    assert not np.allclose(power[2], other[2])
    assert float(power.sum()) == pytest.approx(4.0, rel=1e-5)
    first = policy.power_at(gains[0], problem.energy, 0, problem)
    assert float(power[0]) == pytest.approx(float(first), rel=1e-5)


def test_a_policy_goes_on_from_another(small, trained):
    policy = small.ppo.policy(trained, small.params)
    again = small.ppo.policy(
        small.ppo.start_from(small.init(jax.random.key(6), Hyperparameters()), policy), small.params
    )
    assert_equal_trees(again.state, policy.state)
    np.testing.assert_allclose(again.std, policy.std, rtol=1e-5)
    with pytest.raises(ValueError, match="start"):
        small.ppo.start_from(trained, blank_policy(ActorCriticConfig(5, hidden=(8,))))


@pytest.fixture
def saved(small, trained, tmp_path):
    policy = small.ppo.policy(trained, small.params)
    policy.save_pretrained(tmp_path / "policy")
    return policy, tmp_path / "policy"


def test_files_bring_the_same_policy(saved):
    policy, folder = saved
    loaded = LearnedPower.from_pretrained(folder, num_blocks=4)
    gains, problem = jnp.array([0.1, 2.0, 0.7, 1.0]), power_problem(0.0, 4)
    np.testing.assert_array_equal(ALLOCATE(loaded, gains, problem), ALLOCATE(policy, gains, problem))


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
        "missing ": {k: v for k, v in tensors.items() if k != name},
        "extra extra": tensors | {"extra": np.ones(2, np.float32)},
        "has shape": tensors | {name: np.ones((2, 2), np.float32)},
        "not finite": tensors | {name: tensors[name] * np.nan},
        "must be positive": tensors | {"std": 0 * tensors["std"]},
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


def test_products_outside_the_networks_are_exact(small):
    def train(params):
        return small.ppo.update(small.ppo.init(jax.random.key(0)), params)

    assert inexact_products(train, small.params) == []
