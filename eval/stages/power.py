"""Benchmark of power control: environment steps a second of rollouts alone and of PPO, next to its peers."""

import importlib
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eval.markdown import interval
from eval.measure import Contender, measure
from eval.stages import STAGES, Measured, Stage
from megjax.channel import RayleighFading
from megjax.configs import require, require_count
from megjax.numerics import squared_magnitude
from megjax.power import PPO, EqualPower, PowerControl, PPOConfig, causal_optimum, power_problem, weighted_errors
from megjax.power.environment import EnvParams

NUM_BLOCKS, SNR_DB = 16, (-12.0, 22.0)
SHAPE = {"epochs": 4, "minibatches": 8, "hidden": (64, 64)}
"""Epochs, minibatches and layers of all trainers."""
PEERS = ("purejaxrl_power", "sb3_power")
EQUAL, RANDOM, PROTOCOL = "equal shares", "random shares, observations", "the same by step(), which resets"
HELD_OUT, HELD_OUT_SNR_DB, GAP_SHARE, EVERY = 8192, (-10.0, 0.0, 10.0), 0.95, 5
COLUMNS = ["implementation", "thousand steps/s", "of PureJaxRL-style", "of stable-baselines3", "compilation (s)"]


def run(batches: tuple[int, ...], envs: tuple[int, ...], gap_updates: int, rounds: int, with_peers: bool) -> Measured:
    """Rows of the benchmark file, the peers that are missing, and notes.

    Rollouts run at each of `batches` environments, training at each of `envs`; `gap_updates` is the length of the
    training whose time to 95 % of the gap is noted, 0 for none.
    """
    # Before anything compiles: a program read from the disk's cache would pass for compiled in no time.
    jax.config.update("jax_enable_compilation_cache", False)
    env = PowerControl(NUM_BLOCKS)
    params = env.make_params(snr_db=SNR_DB)
    installed = peers() if with_peers else dict.fromkeys(PEERS)
    rows, load = [], [os.getloadavg()[0]]
    for batch in batches:
        case = f"rollouts alone, T = {NUM_BLOCKS}"
        rows += rows_of(case, batch, rollouts(env, params, batch), rounds, installed)
    for num_envs in envs:
        case = f"PPO from end to end, T = {NUM_BLOCKS}, 64-64 networks, 4 epochs, 8 minibatches"
        rows += rows_of(case, num_envs, trainers(env, params, num_envs, installed), rounds, installed)
    load.append(os.getloadavg()[0])
    notes = [f"The machine's load average was {load[0]:.1f} before and {load[1]:.1f} after these measurements."]
    if gap_updates:
        config = PPOConfig(num_updates=gap_updates, **SHAPE)
        notes.append(gap_note(config, time_to_gap(env, params, config)))
    return rows, [name for name, module in installed.items() if module is None and with_peers], notes


def rows_of(
    case: str, batch: int, contenders: list[Contender], rounds: int, installed: dict[str, ModuleType | None]
) -> list[dict]:
    """One row for each contender, whose call makes `NUM_BLOCKS` steps of `batch` environments."""
    timings = measure(contenders, rounds, f"{case}, {batch}")
    steps, rows = batch * NUM_BLOCKS, []
    seconds = {name: timings[module.NAME].median_s for name, module in installed.items() if _ran(module, timings)}
    for name, timing in timings.items():
        low, high = timing.quartiles_s
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": name,
                "steps_per_second": steps / timing.median_s,
                "steps_per_second_quartiles": [steps / high, steps / low],
                **{f"ratio_to_{peer}": seconds[peer] / timing.median_s if peer in seconds else None for peer in PEERS},
                "compilation_s": max(0.0, timing.first_s - timing.median_s),
                "rounds": rounds,
            }
        )
    return rows


def _ran(module: ModuleType | None, timings: dict) -> bool:
    return module is not None and module.NAME in timings


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.steps_per_second_quartiles
    ratios = [getattr(row, f"ratio_to_{peer}") for peer in PEERS]
    return [
        row.implementation,
        interval(row.steps_per_second / 1e3, low / 1e3, high / 1e3, ",.0f"),
        *("-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios),
        f"{row.compilation_s:.1f}",
    ]


def peers() -> dict[str, ModuleType | None]:
    """Modules of the peers by name; None for one that is not installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.import_module(f"eval.peers.{name}")
        except ImportError:
            found[name] = None
    return found


def rollouts(env: PowerControl, params: EnvParams, batch: int) -> list[Contender]:
    """Episodes of `batch` environments without learning."""

    def equal(key, params):
        def block(state, t):
            return env.advance(state, 1 / (env.num_blocks - t))

        state = env.start(env.begin(key, params))[1]
        return jax.lax.scan(block, state, jnp.arange(env.num_blocks, dtype=jnp.float32))[1].sum()

    def random(key, params):
        begin_key, action_key = jax.random.split(key)

        def block(state, share):
            after, reward = env.advance(state, share)
            return after, (env.get_obs(state), reward)

        state = env.start(env.begin(begin_key, params))[1]
        return jax.lax.scan(block, state, jax.random.uniform(action_key, (env.num_blocks,)))[1]

    def protocol(key, params):
        begin_key, steps_key = jax.random.split(key)

        def block(carry, key):
            obs, state = carry
            step_key, action_key = jax.random.split(key)
            after_obs, after, reward, done, *_ = env.step(step_key, state, jax.random.uniform(action_key), params)
            return (after_obs, after), (obs, reward, done)

        steps = jax.random.split(steps_key, env.num_blocks)
        return jax.lax.scan(block, env.reset(begin_key, params), steps)[1]

    cases = ((EQUAL, equal), (RANDOM, random), (PROTOCOL, protocol))
    return [_rollout(name, fn, params, batch) for name, fn in cases]


def _rollout(name: str, fn: Callable, params: EnvParams, batch: int) -> Contender:
    """`fn(key, params)` of every environment in one program."""
    program = jax.jit(lambda key, params: jax.vmap(fn, (0, None))(jax.random.split(key, batch), params))
    key = jax.random.key(0)
    return Contender(name, lambda: jax.block_until_ready(program(key, params)))


def trainers(
    env: PowerControl, params: EnvParams, num_envs: int, installed: dict[str, ModuleType | None]
) -> list[Contender]:
    """One update, of a rollout of `NUM_BLOCKS` steps and its epochs, by megjax and by the peers."""

    def ours(name, asymmetric):
        ppo = PPO(PPOConfig(num_envs=num_envs, num_updates=10**6, asymmetric=asymmetric, **SHAPE), env)
        return _carried(name, jax.jit(ppo.init)(jax.random.key(0)), ppo.update, params)

    contenders = [ours("megjax", True), ours("megjax, symmetric critic", False)]
    if loops := installed["purejaxrl_power"]:
        for name, every_step in ((loops.NAME, True), (f"{loops.NAME}, reset once a rollout", False)):
            loop = loops.Loop(env, num_envs, NUM_BLOCKS, **SHAPE, every_step=every_step)
            state = jax.jit(loop.init)(jax.random.key(0), params)
            contenders.append(_carried(name, state, loop.update, params))
    if agents := installed["sb3_power"]:
        contenders.append(Contender(agents.NAME, agents.training(env, params, num_envs, NUM_BLOCKS, **SHAPE)))
    return contenders


def _carried(name: str, state, update: Callable, params: EnvParams) -> Contender:
    """A jitted `update(state, params) -> state, metrics`, the state carried from call to call."""
    program = jax.jit(update, donate_argnums=0)

    def call():
        nonlocal state
        state, metrics = program(state, params)
        return jax.block_until_ready((state, metrics))[1]

    return Contender(name, call)


class Gap(NamedTuple):
    """When training had `GAP_SHARE` of the gap at every SNR; `updates` is None if it did not come to that.

    `shares` are those of the gap at `HELD_OUT_SNR_DB` then, or at the end.
    """

    updates: int | None
    seconds: float
    compilation_s: float
    shares: tuple[float, ...]


def time_to_gap(env: PowerControl, params: EnvParams, config: PPOConfig, seed: int = 0) -> Gap:
    """Train until the policy has `GAP_SHARE` of the gap from equal power to the causal optimum on held-out episodes.

    The clock runs for training only: neither for compiling it nor for looking at the policy every few updates.
    """
    fading = RayleighFading()
    gains_of = jax.vmap(lambda key: squared_magnitude(fading.sample(key, env.num_blocks)))
    gains = jax.jit(gains_of)(jax.random.split(jax.random.key(1000 + seed), HELD_OUT))

    @jax.jit
    def mean_return(policy, problem):
        power = jax.vmap(policy.allocate, (0, None))(gains, problem)
        return -jax.vmap(weighted_errors, (None, 0, 0))(problem, gains, power).sum(1).mean()

    problems = [power_problem(snr_db, env.num_blocks) for snr_db in HELD_OUT_SNR_DB]

    def returns_of(policy):
        return np.array([mean_return(policy, problem) for problem in problems])

    equal, best = returns_of(EqualPower()), returns_of(causal_optimum(fading))
    ppo = PPO(config, env)
    state = jax.jit(ppo.init)(jax.random.key(seed))
    several = jax.jit(lambda state, params: jax.lax.scan(lambda s, _: ppo.update(s, params), state, None, EVERY))
    start = time.perf_counter()
    jax.block_until_ready(several(state, params))
    first_s, seconds, shares, updates = time.perf_counter() - start, 0.0, np.zeros(len(problems)), 0
    while updates < config.num_updates and shares.min() < GAP_SHARE:
        start = time.perf_counter()
        state = jax.block_until_ready(several(state, params)[0])
        seconds += time.perf_counter() - start
        updates += EVERY
        shares = (returns_of(ppo.policy(state, params)) - equal) / (best - equal)
    compilation_s = max(0.0, first_s - seconds * EVERY / updates)
    reached = updates if shares.min() >= GAP_SHARE else None
    return Gap(reached, seconds, compilation_s, tuple(shares.tolist()))


def gap_note(config: PPOConfig, gap: Gap) -> str:
    """A sentence for the tables."""
    shares = ", ".join(f"{100 * share:.1f}" for share in gap.shares)
    where = f"the gap from equal power to the causal optimum at -10, 0 and 10 dB ({HELD_OUT:,} held-out episodes each)"
    training = f"{config.num_envs:,} environments and a schedule of {config.num_updates} updates"
    if gap.updates is None:
        return f"With {training}, one policy for all SNRs ended at {shares} % of {where}, after {gap.seconds:.1f} s."
    steps, total = gap.updates * config.num_envs * NUM_BLOCKS, gap.seconds + gap.compilation_s
    return (
        f"Time to {100 * GAP_SHARE:.0f} % of {where}, one policy for all SNRs: {gap.seconds:.1f} s, {total:.1f} s with "
        f"compilation ({gap.updates} updates, {steps:,} steps, then {shares} %; {training})."
    )


def check(args) -> None:
    """ValueError for numbers of environments or updates that PPO cannot have."""
    fits = all(num % SHAPE["minibatches"] == 0 for num in args.envs)
    require(fits, "--envs", args.envs, f"multiples of {SHAPE['minibatches']}, the minibatches")
    require_count("--gap-updates", args.gap_updates, 0)


STAGES.register(
    Stage(
        name="power",
        title="rollouts of power control and PPO",
        version=1,
        rank=30,
        run=lambda args, _: run(args.batches, args.envs, args.gap_updates, args.rounds, args.peers),
        columns=COLUMNS,
        cells=cells,
        check=check,
    )
)
