"""Tests of the power benchmark: its peers learn and do what they say, and the stage writes rows and tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import benchmark
from eval.peers import purejaxrl_power
from eval.stages import power
from megjax.power import PowerControl, PPOConfig
from tests.checks import within_standard_error

T = 4
ENV = PowerControl(T)
PARAMS = ENV.make_params(snr_db=(0.0, 10.0))


# The checker of keys takes a state's for used when a finished episode is replaced by the next inside a scan.
pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


def loop(num_steps=T, **changes):
    return purejaxrl_power.Loop(ENV, 16, num_steps, 2, 4, (8, 8), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("every_step", [True, False])
def test_rollouts_of_the_loop_are_episodes(every_step):
    agent = loop(2 * T if every_step else T, every_step=every_step)
    state = agent.init(jax.random.key(0), PARAMS)
    graph_model = agent._network(jax.random.key(1))
    envs, obs, batch = jax.jit(lambda s, k: agent._rollout(graph_model, s, k, PARAMS))(state, jax.random.key(2))
    ends = np.arange(agent.num_steps) % T == T - 1
    assert np.array_equal(batch.done, np.tile(ends[:, None], (1, 16)))
    assert np.array_equal(envs.block, np.zeros(16))  # new episodes have begun
    assert np.allclose(envs.energy, T) and not np.allclose(obs, batch.obs[0])
    assert (batch.reward < 0).all() and (batch.reward > -2).all()
    if every_step:
        assert not np.allclose(batch.obs[T], batch.obs[0])


def test_advantages_by_hand():
    blank = jnp.zeros((3, 1))
    rewards, values = jnp.float32([[1.0], [2.0], [3.0]]), jnp.float32([[0.5], [1.0], [2.0]])
    done = jnp.array([[False], [True], [False]])
    batch = purejaxrl_power.Transition(blank, blank, blank, values, rewards, done)
    advantages, targets = purejaxrl_power.gae(batch, jnp.float32([4.0]), 0.5)
    expected = np.array([[1 + 1 - 0.5 + 0.5 * (2 - 1)], [2 - 1], [3 + 4 - 2]])
    assert advantages == pytest.approx(expected)
    assert targets == pytest.approx(expected + np.asarray(values))


@pytest.mark.slow
def test_the_loop_learns_with_what_it_sees():
    agent = purejaxrl_power.Loop(ENV, 128, T, 4, 4, (16,), every_step=False)
    update = jax.jit(agent.update)
    state, returns = agent.init(jax.random.key(0), PARAMS), []
    for _ in range(40):
        state, metrics = update(state, PARAMS)
        returns.append(float(metrics["return"]))
    first, last = np.array(returns[:8]), np.array(returns[-8:])
    error = np.sqrt((first.var() + last.var()) / 8)
    assert np.isfinite(returns).all() and last.mean() > first.mean() + 3 * error


def test_both_ways_to_reset_start_alike():
    states = [loop(every_step=every).init(jax.random.key(0), PARAMS) for every in (True, False)]
    assert np.array_equal(states[0].obs, states[1].obs)


@pytest.mark.slow
def test_rollouts_do_the_work():
    num = 512
    contenders = {contender.name: contender for contender in power.rollouts(ENV, PARAMS, num)}
    returns = contenders[power.EQUAL].call()
    assert returns.shape == (num,) and (returns > -T).all() and (returns < 0).all()
    _, rewards = contenders[power.RANDOM].call()
    obs, stepped, done = contenders[power.PROTOCOL].call()
    assert obs.shape == (num, T, *ENV.observation_space().shape)
    assert np.array_equal(done, np.tile(np.arange(T) == T - 1, (num, 1)))
    totals = [np.asarray(x.sum(1)) for x in (rewards, stepped)]  # the same law
    error = np.sqrt(sum(x.var() / num for x in totals))
    within_standard_error(totals[0] - totals[1], 0)
    assert returns.mean() > totals[0].mean() + 3 * error  # equal shares of all energy are better than random ones


@pytest.mark.slow
def test_the_stage_writes_rows_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "NUM_BLOCKS", T)
    rollouts, trainers = power.rollouts, power.trainers
    monkeypatch.setattr(power, "rollouts", lambda *args: rollouts(*args)[:1])
    monkeypatch.setattr(power, "trainers", lambda *args: trainers(*args)[::2])  # without the second version of each
    monkeypatch.setattr(power, "time_to_gap", lambda *args: power.Gap(10, 2.0, 5.0, (0.951, 0.96, 0.99)))
    monkeypatch.setattr(power, "SHAPE", {"epochs": 1, "minibatches": 2, "hidden": (4,)})
    arguments = benchmark.Arguments("power", batches=(8,), envs=(16,), gap_updates=2, rounds=3, folder=tmp_path)
    benchmark.run(arguments)
    (path,) = tmp_path.glob("power-*.json")
    result = json.loads(path.read_text())
    rows = {row["implementation"]: row for row in result["rows"]}
    assert {"megjax", purejaxrl_power.NAME, power.EQUAL} <= set(rows)
    for row in rows.values():
        low, high = row["steps_per_second_quartiles"]
        assert 0 < low <= row["steps_per_second"] <= high
    ratio = rows["megjax"]["steps_per_second"] / rows[purejaxrl_power.NAME]["steps_per_second"]
    assert rows["megjax"]["ratio_to_purejaxrl_power"] == pytest.approx(ratio)
    assert rows[power.EQUAL]["ratio_to_purejaxrl_power"] is None
    sb3 = power.peers()["sb3_power"]
    assert result["missing_peers"] == ([] if sb3 else ["sb3_power"])
    assert sb3 is None or rows["megjax"]["ratio_to_sb3_power"] > 0
    assert any("2.0 s, 7.0 s with compilation (10 updates, 163,840 steps" in note for note in result["notes"])
    benchmark.write_tables(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert f"| {ratio:.2f} |" in text and "of PureJaxRL-style" in text and "Time to 95 % of the gap" in text


@pytest.mark.slow
def test_time_to_the_gap_is_when_it_is_reached(monkeypatch):
    monkeypatch.setattr(power, "GAP_SHARE", 0.3)
    monkeypatch.setattr(power, "EVERY", 5)
    config = PPOConfig(num_envs=256, num_updates=60, hidden=(16,))
    gap = power.time_to_gap(ENV, ENV.make_params(snr_db=(-12.0, 12.0)), config)
    assert gap.updates is not None and gap.updates % 5 == 0 and min(gap.shares) >= 0.3 and max(gap.shares) < 1.05
    assert gap.seconds > 0 and gap.compilation_s > 0
    note = power.gap_note(config, gap)
    assert f"{gap.updates} updates" in note and "256 environments" in note
    late = power.gap_note(config, gap._replace(updates=None))
    assert "ended at" in late and "Time to" not in late


def test_without_peers_there_are_lines(monkeypatch):
    monkeypatch.setattr(power, "PEERS", ("no_such_peer",))
    assert power.peers() == {"no_such_peer": None}
    monkeypatch.setattr(power, "PEERS", ("purejaxrl_power", "sb3_power"))
    monkeypatch.setattr(power, "rollouts", lambda *args: [])
    monkeypatch.setattr(power, "trainers", lambda *args: [])
    rows, missing, notes = power.run((8,), (8,), 0, 3, with_peers=False)
    assert rows == missing == [] and len(notes) == 1 and "load average" in notes[0]


def test_bad_arguments_are_told(tmp_path):
    with pytest.raises(ValueError, match="--envs.*multiples of 8"):
        benchmark.run(benchmark.Arguments("power", envs=(12,), folder=tmp_path))
    with pytest.raises(ValueError, match="--gap-updates"):
        benchmark.run(benchmark.Arguments("power", gap_updates=-1, folder=tmp_path))
