"""Power control as an environment with gymnax 1.0's protocol, pure JAX: one episode is one image over T fading blocks.

The state holds the whole realisation, drawn at reset, so correlated and imperfectly known gains cost nothing extra;
the observation is what the transmitter knows. Protocol: R. T. Lange, "gymnax: A JAX-based reinforcement learning
environment library", 2022 (static environment, swept parameters, functional state).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Complex, Float, Int, Key, UInt32

from megjax.channel import Fading, ImperfectCSI, RayleighFading, effective_noise_var
from megjax.configs import require, require_count
from megjax.keys import THREEFRY, threefry
from megjax.numerics import safe_sqrt, squared_magnitude
from megjax.power.laws import GainLaw, LoadTable, gain_law, load_table, mean_error, static_power
from megjax.power.problem import Problem, check_num_blocks, check_powers, check_weights, pay
from megjax.units import check_snr_db, db_to_linear, linear_to_db

PLAN_FLOOR, LARGEST_OFFSET, GAIN_FLOOR = 0.05, 12.0, 1e-4

Quality = Callable[
    [Key[Array, ""], Complex[Array, " t"], Float[Array, " t"], Float[Array, ""]],
    Float[Array, ""],
]
"""`(key, gains [t], power [t], snr_db) -> reward` at the end of an episode, such as the PSNR of a decoded image."""


class Box(NamedTuple):
    """A box of real numbers: a space as gymnax has it."""

    low: float
    high: float
    shape: tuple[int, ...]
    dtype: type = jnp.float32

    def sample(self, key: Key[Array, ""]) -> Array:
        """A point of the box, uniform where it is bounded and standard normal where not."""
        key = threefry(key)
        if math.isinf(self.high) or math.isinf(self.low):
            return jax.random.normal(key, self.shape, self.dtype)
        return jax.random.uniform(key, self.shape, self.dtype, self.low, self.high)

    def contains(self, x: Array) -> Array:
        """Whether `x` lies in the box."""
        return jnp.all((jnp.asarray(x) >= self.low) & (jnp.asarray(x) <= self.high))


class EnvParams(NamedTuple):
    """What a sweep varies; made by `PowerControl.make_params`.

    SNR (1 / sigma^2 in dB) is uniform in an interval. `weights` [r s t] are block weights of r kinds of image at the
    SNRs `grid_db` [s], between which they are interpolated; an episode draws its kind. `weight_spread` is the standard
    deviation of a log-normal factor on every weight. `csi` is None for gains that both ends know.
    """

    fading: Fading
    law: GainLaw
    table: LoadTable
    min_snr_db: Float[Array, ""]
    max_snr_db: Float[Array, ""]
    grid_db: Float[Array, " s"]
    weights: Float[Array, "r s t"]
    weight_spread: Float[Array, ""]
    mean_power: Float[Array, ""]
    max_power: Float[Array, ""]
    csi: ImperfectCSI | None


class Episode(NamedTuple):
    """What reset draws and works out: the problem, its open-loop `plan` [t], the gains and what is known of them.

    `known` [t] are power gains as the transmitter knows them, `received` [t] those that the receiver's LMMSE weights
    use, of error variance `error_var` [t]; `scale` is the error that the plan expects, for relative rewards. `features`
    are what is observed, for all blocks.
    """

    key: UInt32[Array, " w"]
    problem: Problem
    plan: Float[Array, " t"]
    scale: Float[Array, ""]
    gains: Complex[Array, " t"]
    known: Float[Array, " t"]
    received: Float[Array, " t"]
    error_var: Float[Array, " t"]
    features: "Features"


class EnvState(NamedTuple):
    """An episode before block `block`: powers so far [t] and the energy left."""

    episode: Episode
    block: Int[Array, ""]
    energy: Float[Array, ""]
    power: Float[Array, " t"]


@dataclasses.dataclass(frozen=True)
class PowerControl:
    """The environment; `history` past gains are observed besides the current one.

    The action is the share in [0, 1] of the energy left, the last block spending the rest. Without `quality` the reward
    of block t is -w_t / (1 + gamma_t); with it, an episode is rewarded once, at its end.
    """

    num_blocks: int = 16
    history: int = 0
    quality: Quality | None = None

    def __post_init__(self):
        check_num_blocks(self.num_blocks)
        require_count("history", self.history, 0)

    @property
    def name(self) -> str:
        """Name of the environment."""
        return "PowerControl"

    @property
    def num_actions(self) -> int:
        """Dimension of the action."""
        return 1

    @property
    def default_params(self) -> EnvParams:
        """Rayleigh fading, equal weights, -10 to 20 dB."""
        return self.make_params()

    def make_params(
        self,
        fading: Fading | None = None,
        snr_db: tuple[float, float] = (-10.0, 20.0),
        weights: Float[ArrayLike, "*k t"] | None = None,
        weight_grid_db: Float[ArrayLike, " s"] | None = None,
        weight_spread: float = 0.0,
        mean_power: float = 1.0,
        max_power: float = math.inf,
        csi: ImperfectCSI | None = None,
    ) -> EnvParams:
        """Parameters; `weights` are [t], [r t] of r kinds, or [r s t] at the s SNRs `weight_grid_db`.

        ValueError for weights of another length, negative or not finite, a grid that does not fit or ascend, an SNR
        interval that is empty, or powers that are not positive.
        """
        low, high = check_snr_db(snr_db).tolist() if np.shape(snr_db) == (2,) else (1.0, 0.0)
        require(low <= high, "snr_db", snr_db, "(lowest, highest) in dB")
        check_powers(mean_power, max_power)
        require(0 <= weight_spread < math.inf, "weight_spread", weight_spread, "finite and 0 or more")
        weights = np.ones(self.num_blocks) if weights is None else check_weights(weights, self.num_blocks)
        grid = np.zeros(1) if weight_grid_db is None else check_snr_db(weight_grid_db)
        if weights.ndim < 3:
            weights = weights.reshape(-1, 1, self.num_blocks)
        require(weights.ndim == 3, "weights' shape", weights.shape, f"[t], [r t] or [r s t], t = {self.num_blocks}")
        fits = grid.shape == weights.shape[1:2] and bool(np.all(np.diff(grid) > 0))
        require(
            fits, "weight_grid_db", weight_grid_db, f"{weights.shape[1]} ascending SNRs, one for each row of weights"
        )
        fading = RayleighFading() if fading is None else fading
        law = gain_law(fading, self.num_blocks)
        numbers = (jnp.float32(x) for x in (weight_spread, mean_power, max_power))
        bounds = jnp.float32(low), jnp.float32(high), jnp.asarray(grid, jnp.float32)
        table = jax.jit(load_table)(law)
        return EnvParams(fading, law, table, *bounds, jnp.asarray(weights, jnp.float32), *numbers, csi)

    def begin(self, key: Key[Array, ""], params: EnvParams) -> Episode:
        """Draw an episode: SNR, weights, gains, and the plan for them."""
        snr_key, kind_key, spread_key, gain_key, quality_key = jax.random.split(threefry(key), 5)
        snr_db = jax.random.uniform(snr_key, (), jnp.float32, params.min_snr_db, params.max_snr_db)
        kinds, levels, _ = params.weights.shape
        weights = params.weights[jax.random.randint(kind_key, (), 0, kinds, jnp.int32) if kinds > 1 else 0]
        if levels > 1:
            weights = jax.vmap(lambda column: jnp.interp(snr_db, params.grid_db, column), 1)(weights)
        else:
            weights = weights[0]
        spread = params.weight_spread * jax.random.normal(spread_key, (self.num_blocks,), jnp.float32)
        weights = weights * jnp.exp(spread)
        problem = Problem(
            db_to_linear(snr_db), weights / weights.mean(), self.num_blocks * params.mean_power, params.max_power
        )
        plan = static_power(params.table, problem.weights, problem.snr, problem.energy, problem.max_power)
        scale = jnp.sum(problem.weights * mean_error(params.law, plan * problem.snr))
        if params.csi is None:
            gains = params.fading.sample(gain_key, self.num_blocks)
            known = received = squared_magnitude(gains)
            error_var = jnp.zeros(self.num_blocks, jnp.float32)
        else:
            knowledge = params.csi.sample(gain_key, params.fading, self.num_blocks, 1 / problem.snr)
            gains, error_var = knowledge.gains, knowledge.error_var
            known, received = (squared_magnitude(x) for x in (knowledge.transmitter, knowledge.receiver))
        features = episode_features(known, problem, plan, self.history)
        # As words, since whole states are selected between and keys may not be used twice.
        words = jax.random.key_data(quality_key)
        return Episode(words, problem, plan, scale, gains, known, received, error_var, features)

    def reset(self, key: Key[Array, ""], params: EnvParams | None = None) -> tuple[Float[Array, " o"], EnvState]:
        """First observation and state of a new episode; `params` are `default_params` if not given."""
        return self.reset_env(key, self._given(params))

    def reset_env(self, key: Key[Array, ""], params: EnvParams) -> tuple[Float[Array, " o"], EnvState]:
        """As `reset`, with parameters."""
        return self.start(self.begin(key, params))

    def start(self, episode: Episode) -> tuple[Float[Array, " o"], EnvState]:
        """Observation and state before the first block of an episode."""
        energy = jnp.asarray(episode.problem.energy, jnp.float32)
        state = EnvState(episode, jnp.int32(0), energy, jnp.zeros(self.num_blocks, jnp.float32))
        return self.get_obs(state), state

    def step(
        self,
        key: Key[Array, ""],
        state: EnvState,
        action: Float[ArrayLike, "*a"],
        params: EnvParams | None = None,
    ) -> tuple[Float[Array, " o"], EnvState, Float[Array, ""], Bool[Array, ""], Bool[Array, ""], dict[str, Array]]:
        """Observation, state, reward, terminated, truncated (never), info.

        A finished episode is followed by a new one, whose first observation is returned; the last one of the old is
        `info["final_observation"]`.
        """
        params = self._given(params)
        step_key, reset_key = jax.random.split(threefry(key))
        last, after, reward, terminated, info = self.step_env(step_key, state, action, params)
        first, fresh = self.reset_env(reset_key, params)
        obs, after = jax.tree.map(lambda new, old: jnp.where(terminated, new, old), (first, fresh), (last, after))
        truncated = self.is_truncated(after, params)
        info |= {"terminated": terminated, "truncated": truncated, "final_observation": last}
        return obs, after, reward, terminated, truncated, info

    def step_env(
        self, key: Key[Array, ""] | None, state: EnvState, action: Float[ArrayLike, "*a"], params: EnvParams | None
    ) -> tuple[Float[Array, " o"], EnvState, Float[Array, ""], Bool[Array, ""], dict[str, Array]]:
        """Observation, state, reward, terminated, info, without the new episode; key and parameters are not needed."""
        del key, params
        after, reward = self.advance(state, jnp.reshape(jnp.asarray(action, jnp.float32), ()))
        terminated = self.is_terminated(after)
        if self.quality is not None:
            reward = jax.lax.cond(terminated, self.final_reward, lambda _: jnp.float32(0), after)
        return self.get_obs(after), after, reward, terminated, {"discount": jnp.where(terminated, 0.0, 1.0)}

    def is_terminated(self, state: EnvState, params: EnvParams | None = None) -> Bool[Array, ""]:
        """Whether all blocks are sent."""
        del params
        return state.block >= self.num_blocks

    def is_truncated(self, state: EnvState, params: EnvParams | None = None) -> Bool[Array, ""]:
        """False: an episode ends with its last block and never before."""
        del state, params
        return jnp.bool_(False)

    def _given(self, params: EnvParams | None) -> EnvParams:
        if params is not None:
            return params
        with jax.ensure_compile_time_eval():
            return self.default_params

    def advance(self, state: EnvState, share: Float[Array, ""]) -> tuple[EnvState, Float[Array, ""]]:
        """State after a block that spends this share of the energy left, and its -w_t / (1 + gamma_t)."""
        problem, block = state.episode.problem, state.block
        share = jnp.where(block >= self.num_blocks - 1, 1.0, jnp.clip(share, 0.0, 1.0))
        energy, power = pay(state.energy, share * state.energy, problem.max_power)
        here = jnp.arange(self.num_blocks) == block
        after = EnvState(state.episode, block + 1, energy, jnp.where(here, power, state.power))
        return after, -jnp.sum(jnp.where(here, self.errors(state.episode, jnp.where(here, power, 0.0)), 0.0))

    def errors(self, episode: Episode, power: Float[Array, " t"]) -> Float[Array, " t"]:
        """w_t / (1 + gamma_t) [t] at these powers; with estimated gains the error of the estimate counts as noise."""
        problem = episode.problem
        noise = effective_noise_var(1 / problem.snr, power, episode.error_var)
        return problem.weights / (1 + power * episode.received / noise)

    def final_reward(self, state: EnvState) -> Float[Array, ""]:
        """`quality` of a finished episode."""
        episode = state.episode
        key = jax.random.wrap_key_data(episode.key, impl=THREEFRY)
        return self.quality(key, episode.gains, state.power, linear_to_db(episode.problem.snr))

    def observe(
        self, key: Key[Array, ""] | None, state: EnvState, action: Any = None, params: EnvParams | None = None
    ) -> Float[Array, " o"]:
        """`get_obs` of a state, as gymnax asks for it."""
        del key, action, params
        return self.get_obs(state)

    def get_obs(self, state: EnvState) -> Float[Array, " o"]:
        """Features of what is known before the current block; see `episode_features` and `observation`."""
        block = jnp.minimum(state.block, self.num_blocks - 1)
        row = jax.tree.map(lambda x: x[block], state.episode.features)
        return observation(row, state.energy)

    def action_space(self, params: EnvParams | None = None) -> Box:
        """The share of the energy left."""
        del params
        return Box(0.0, 1.0, (1,))

    def observation_space(self, params: EnvParams | None = None) -> Box:
        """The numbers of `observation`, unbounded."""
        del params
        return Box(-math.inf, math.inf, (observation_size(self.num_blocks, self.history),))


class Features(NamedTuple):
    """What can be said of the blocks before energies are known: `fixed` [t f], and what `observation` needs [t] each.

    `share` is the plan's share of the energy left, `planned` the energy that the plan has left, `slope` the SNR that a
    unit of energy brings, spread over the blocks left; `log_gain` and `left` are the known gain's logarithm and the
    number of blocks from this one on.
    """

    fixed: Float[Array, "t f"]
    share: Float[Array, " t"]
    planned: Float[Array, " t"]
    slope: Float[Array, " t"]
    log_gain: Float[Array, " t"]
    left: Float[Array, " t"]


def observation_size(num_blocks: int, history: int) -> int:
    """Number of features of `observation`."""
    return 8 + num_blocks + history


def episode_features(known: Float[Array, " t"], problem: Problem, plan: Float[Array, " t"], history: int) -> Features:
    """Features of all blocks; those of block t depend on the known power gains up to t only.

    `fixed` are ln of the gain, the planned share's log-odds, the SNR, the blocks left, square roots of the remaining
    weights over their mean, padded with zeros, and ln of `history` past gains, newest first, 0 before the first block.
    The planned share of the energy left is a twentieth equal for all remaining blocks and otherwise the plan's, so that
    no block is planned to get nothing or all; with equal weights it is 1 / (T - t), the equal share.
    """
    num_blocks = plan.shape[0]
    blocks = np.arange(num_blocks)
    left = jnp.asarray(num_blocks - blocks, jnp.float32)
    planned = jnp.cumsum(plan[::-1])[::-1]
    share = jnp.where(planned > 0, plan / jnp.where(planned > 0, planned, 1.0), 1 / left)
    share = jnp.minimum((1 - PLAN_FLOOR) * share + PLAN_FLOOR / left, 1.0)
    log_gains = jnp.log(known + GAIN_FLOOR)
    odds = jnp.log(share) - jnp.log(jnp.maximum(1 - share, 1e-3))
    columns = [
        log_gains,
        odds / 2,
        jnp.full(num_blocks, linear_to_db(problem.snr) / 10, jnp.float32),
        left / num_blocks,
    ]
    ahead = blocks[:, None] + blocks[None]
    weights = jnp.where(ahead < num_blocks, problem.weights[np.minimum(ahead, num_blocks - 1)], 0.0)
    mean = weights.sum(1, keepdims=True) / left[:, None]
    parts = [jnp.stack(columns, axis=1), safe_sqrt(weights / jnp.maximum(mean, 1e-12))]
    if history:
        back = blocks[:, None] - 1 - np.arange(history)[None]
        parts.append(jnp.where(back >= 0, log_gains[np.maximum(back, 0)], 0.0))
    planned = planned + 1e-6 * problem.energy
    return Features(jnp.concatenate(parts, axis=1), share, planned, problem.snr / left, log_gains, left)


def observation(row: Features, energy: Float[Array, ""]) -> Float[Array, " o"]:
    """What a policy's network sees [8 + T + history] in a block: its row of the features, and four of the energy left.

    Those are ln of the mean SNR that it still allows, 1 more inside; ln of the energy over the planned; how a greedy
    transmitter would depart from the plan's power p, were the price of energy what the plan's blocks make of it: ln of
    the ratio r of the worth of the first unit of power here to that price, halved, and ln of the greedy power over
    p, (r^1/2 - 1) / (g p snr). The price is that of Rayleigh fading, E[g / (1 + x g)^2] at x = p snr, by the
    approximation 1 / ((1 + 3 x) (1 + x / 4)).
    """
    allowed = jnp.log1p(energy * row.slope) / 2
    snr = row.share * energy * row.slope * row.left
    log_ratio = 0.5 * (row.log_gain + jnp.log1p(3 * snr) + jnp.log1p(snr / 4))
    greedy = jnp.maximum(jnp.expm1(log_ratio), 0.0) / (jnp.exp(row.log_gain) * snr + 1e-6)
    own = [allowed, jnp.log(energy / row.planned + 1e-3), log_ratio, jnp.log(greedy + 0.02)]
    return jnp.concatenate([row.fixed, jnp.stack(own)])


def share_of_offset(planned_share: Float[Array, "*s"], offset: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The action that a number `a` of a policy stands for: u = q / (q + (1 - q) exp(-a)), q the planned share.

    At a = 0 it follows the plan; with equal weights it is u = 1 / (1 + (T - t - 1) exp(-a)), a = 0 the equal share.
    """
    offset = jnp.clip(offset, -LARGEST_OFFSET, LARGEST_OFFSET)
    return planned_share / (planned_share + (1 - planned_share) * jnp.exp(-offset))
