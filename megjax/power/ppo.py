"""PPO for power control as one jittable program: rollout, advantages, epochs and minibatches, scanned over updates.

J. Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (clipped objective, eq. 7), with generalised
advantage estimation at discount 1, as episodes are finite (J. Schulman et al., "High-Dimensional Continuous Control
Using Generalized Advantage Estimation", 2016, eq. 16). A rollout is one whole episode of every environment, so nothing
is reset inside it; the last block, which takes what is left, needs no decision. Environments are exchangeable, so
minibatches are fixed groups of them and nothing is shuffled.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from megjax.configs import require, require_positive_integers
from megjax.keys import threefry
from megjax.power.actor_critic import ActorCritic, ActorCriticConfig, LearnedPower
from megjax.power.environment import EnvParams, EnvState, Episode, PowerControl, observation, share_of_offset
from megjax.precision import exact_matmul, promoting
from megjax.units import linear_to_db

SNR_BINS, STD_FLOOR = 8, 1e-3
_LOG_2PI = float(np.log(2 * np.pi))


class Hyperparameters(NamedTuple):
    """What may be vmapped over: rates and coefficients at the first update; each falls as `PPOConfig` says."""

    learning_rate: Float[Array, ""] = 6e-3
    clip: Float[Array, ""] = 0.2
    entropy: Float[Array, ""] = 1e-3
    gae_lambda: Float[Array, ""] = 0.7
    value_weight: Float[Array, ""] = 0.5


DEFAULTS = Hyperparameters()


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Shapes and lengths of the training; one update is an episode of each of `num_envs` environments.

    Over `num_updates`, the learning rate falls to zero by a cosine, the clip range linearly to `final_clip` of itself
    and the entropy bonus linearly to zero. `relative` rewards are in units of the error that the open-loop plan
    expects, which gives all SNRs a say.
    """

    num_envs: int = 4096
    num_updates: int = 200
    epochs: int = 4
    minibatches: int = 16
    hidden: tuple[int, ...] = (64, 64)
    asymmetric: bool = True
    relative: bool = True
    initial_std: float = 1.0
    final_clip: float = 0.5
    clip_norm: float = 0.5

    def __post_init__(self):
        names = ("num_envs", "num_updates", "epochs", "minibatches", "hidden")
        require_positive_integers(self, "PPO", names)
        fits = self.num_envs % self.minibatches == 0
        require(fits, "PPO: minibatches", self.minibatches, f"a divisor of num_envs, {self.num_envs}")
        require(self.num_updates >= 2, "PPO: num_updates", self.num_updates, "at least 2: the first measures only")
        require(0 <= self.final_clip <= 1, "PPO: final_clip", self.final_clip, "in [0, 1]")
        require(self.clip_norm > 0, "PPO: clip_norm", self.clip_norm, "positive")

    def steps(self, num_blocks: int) -> int:
        """Environment steps of the whole training."""
        return self.num_envs * self.num_updates * num_blocks


class Moments(NamedTuple):
    """Running mean and variance [o] of the observations over `count` rollouts' worth of them."""

    mean: Float[Array, " o"]
    var: Float[Array, " o"]
    count: Float[Array, ""]


class TrainState(NamedTuple):
    """All that training carries from update to update; its draws depend on `key` and `step`, the updates done, only."""

    step: Int[Array, ""]
    key: Key[Array, ""]
    params: Any
    opt_state: Any
    moments: Moments
    hyper: Hyperparameters


class Rollout(NamedTuple):
    """One episode of n environments, decisions of blocks 0 to T - 2 (T' = T - 1) along the first axis."""

    obs: Float[Array, "t n o"]
    critic_obs: Float[Array, "t n c"]
    offset: Float[Array, "t n"]
    log_prob: Float[Array, "t n"]
    baseline: Float[Array, "t n"]
    rewards: Float[Array, "t n"]
    returns: Float[Array, " n"]
    snr_db: Float[Array, " n"]


class PPO:
    """Training of one environment and configuration: pure `init` and `update`, and the policy of a state."""

    def __init__(self, config: PPOConfig, env: PowerControl):
        require(env.num_blocks >= 2, "num_blocks", env.num_blocks, "at least 2: one block takes all of the energy")
        self.config, self.env = config, env
        self.network = ActorCriticConfig(
            env.num_blocks, env.history, config.hidden, config.asymmetric, config.initial_std
        )
        self.graph = nnx.split(nnx.eval_shape(lambda: ActorCritic(self.network, nnx.Rngs(0))))[0]

    def init(self, key: Key[Array, ""], hyper: Hyperparameters = DEFAULTS) -> TrainState:
        """The state before the first update."""
        key, network_key = jax.random.split(threefry(key))
        params = nnx.split(ActorCritic(self.network, nnx.Rngs(network_key)))[1]
        size = self.env.observation_space().shape[0]
        moments = Moments(jnp.zeros(size, jnp.float32), jnp.ones(size, jnp.float32), jnp.float32(0))
        hyper = Hyperparameters(*(jnp.asarray(x, jnp.float32) for x in hyper))
        return TrainState(jnp.int32(0), key, params, self._optimizer().init(params), moments, hyper)

    def start_from(self, state: TrainState, policy: LearnedPower) -> TrainState:
        """A state whose actor and standardisation are those of a trained policy; ValueError if it does not fit.

        The standardisation counts as that of as many rollouts as the training has, so that it hardly moves.
        """
        env = (self.network.num_blocks, self.network.history, self.network.hidden)
        own = (policy.config.num_blocks, policy.config.history, policy.config.hidden)
        require(own == env, "start: (num_blocks, history, hidden)", own, f"{env}, as the environment and PPO have")
        model = nnx.merge(self.graph, state.params)
        nnx.update(model.actor, policy.state)
        count = jnp.float32(self.config.num_updates)
        moments = Moments(policy.mean, jnp.square(policy.std - STD_FLOOR), count)
        return state._replace(params=nnx.split(model)[1], moments=moments)

    def update(self, state: TrainState, params: EnvParams) -> tuple[TrainState, dict[str, Array]]:
        """One rollout and the epochs over it; metrics are means over the rollout and the minibatches."""
        config, done = self.config, state.step.astype(jnp.float32) / self.config.num_updates
        episode_key, action_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        # Moments from the rollouts before, so that the old log-probabilities stay those of the policy that acted.
        model = nnx.merge(self.graph, state.params)
        rollout = self._rollout(model, state.moments, episode_key, action_key, params)
        moments = _merge(state.moments, rollout.obs)
        values = self._values(model, state.moments, rollout)
        advantages, targets = _gae(rollout.rewards, values, state.hyper.gae_lambda)
        advantages = self._even(advantages, rollout.snr_db, params)
        batch = (rollout.obs, rollout.critic_obs, rollout.offset, rollout.log_prob, rollout.baseline)
        batch = jax.tree.map(self._minibatches, (*batch, advantages, targets))
        clip = state.hyper.clip * (1 - (1 - config.final_clip) * done)
        entropy = state.hyper.entropy * (1 - done)
        rate = state.hyper.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        optimize = promoting(self._optimizer().update)  # Adam raises a float to an integer power

        def minibatch(carry, part):
            weights, opt_state = carry
            settings = (state.moments, part, clip, entropy, state.hyper.value_weight)
            (_, metrics), grads = jax.value_and_grad(self._loss, has_aux=True)(weights, *settings)
            updates, opt_state = optimize(grads, opt_state)
            weights = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
            return (weights, opt_state), metrics

        def epoch(carry, _):
            return jax.lax.scan(minibatch, carry, batch)

        (weights, opt_state), metrics = jax.lax.scan(epoch, (state.params, state.opt_state), None, config.epochs)
        metrics = {"return": rollout.returns.mean(), **jax.tree.map(jnp.mean, metrics)}
        after = TrainState(state.step + 1, state.key, weights, opt_state, moments, state.hyper)
        # The first rollout only measures the observations.
        measured = state.moments.count > 0
        learned, before = (weights, opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(measured, new, old), learned, before)
        after = after._replace(params=params, opt_state=opt_state)
        return after, metrics

    def policy(self, state: TrainState, params: EnvParams) -> LearnedPower:
        """The actor of a state as a power policy, acting by its mean."""
        graph, weights = nnx.split(nnx.merge(self.graph, state.params).actor)
        std = jnp.sqrt(state.moments.var) + STD_FLOOR
        return LearnedPower(self.network, graph, weights, state.moments.mean, std, params.table)

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.config.clip_norm), optax.scale_by_adam(eps=1e-5))

    def _rollout(self, model, moments: Moments, episode_key, action_key, params: EnvParams) -> Rollout:
        num, env = self.config.num_envs, self.env
        episodes = jax.vmap(env.begin, (0, None))(jax.random.split(episode_key, num), params)
        rows = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:-1], episodes.features)
        noise = jax.random.normal(action_key, (env.num_blocks - 1, num), jnp.float32)
        max_power = episodes.problem.max_power
        look = jax.vmap(observation)

        def step(energy, inputs):
            row, noise = inputs
            obs = look(row, energy)
            mean, log_std = model.actor(_standardise(obs, moments))
            offset = mean + jnp.exp(log_std) * noise
            power = jnp.minimum(share_of_offset(row.share, offset) * energy, max_power)
            return jnp.maximum(energy - power, 0.0), (energy, power, obs, offset, log_std)

        energy = jnp.broadcast_to(episodes.problem.energy, num)
        left, (energies, power, obs, offset, log_std) = jax.lax.scan(step, energy, (rows, noise))
        power = jnp.concatenate([power, jnp.minimum(left, max_power)[None]]).T
        log_prob = -0.5 * (jnp.square(noise) + _LOG_2PI) - log_std
        rewards, scale = self._rewards(episodes, power)
        critic_obs, baseline = self._critic_inputs(episodes, obs, energies, scale)
        # The last block has no decision: its reward belongs to the one before.
        merged = rewards[:, :-1].at[:, -1].add(rewards[:, -1]).T
        return Rollout(
            obs,
            critic_obs,
            offset,
            log_prob,
            baseline,
            merged,
            (rewards * scale[:, None]).sum(1),
            linear_to_db(episodes.problem.snr),
        )

    def _rewards(self, episodes: Episode, power: Float[Array, "n t"]) -> tuple[Float[Array, "n t"], Float[Array, " n"]]:
        """Rewards of the blocks in units of the returned scale [n]."""
        env, num = self.env, len(power)
        if env.quality is not None:
            states = EnvState(episodes, jnp.full(num, env.num_blocks), jnp.zeros(num, jnp.float32), power)
            final = jax.vmap(env.final_reward)(states)
            return jnp.zeros_like(power).at[:, -1].set(final), jnp.ones(num, jnp.float32)
        scale = episodes.scale if self.config.relative else jnp.ones(num, jnp.float32)
        return -jax.vmap(env.errors)(episodes, power) / scale[:, None], scale

    def _critic_inputs(self, episodes: Episode, obs, energies, scale) -> tuple[Array, Array]:
        """What the critic sees [t n c], and the return [t n] that it corrects: that of following the plan from here."""
        if not self.config.asymmetric:
            return obs, jnp.zeros(obs.shape[:2], jnp.float32)
        num_blocks = self.env.num_blocks
        blocks = np.arange(num_blocks)
        ahead = blocks[:-1, None] + blocks[None]
        log_gains = jnp.log(episodes.received + 1e-4)
        future = jnp.where((ahead < num_blocks)[None], log_gains[:, np.minimum(ahead, num_blocks - 1)], 0.0)

        def follow(energy, start):
            """Relative return when the energy left is spread as planned over the blocks from `start`."""
            remaining = (blocks >= start)[None]
            plan = jnp.where(remaining, episodes.plan, 0.0) + 1e-6
            share = energy / jnp.sum(jnp.where(remaining, plan, 0.0), axis=1)
            power = jnp.minimum(share[:, None] * plan, episodes.problem.max_power[:, None])
            errors = jax.vmap(self.env.errors)(episodes, power)
            return -jnp.sum(jnp.where(remaining, errors, 0.0), axis=1) / scale

        returns = jax.vmap(follow)(energies, jnp.arange(num_blocks - 1))
        critic_obs = jnp.concatenate([obs, returns[..., None], jnp.moveaxis(future, 1, 0)], axis=-1)
        return critic_obs, jnp.zeros_like(returns) if self.env.quality is not None else returns

    def _even(self, advantages: Float[Array, "t n"], snr_db: Float[Array, " n"], params: EnvParams) -> Array:
        """Advantages standardised among episodes of similar SNR, so that no SNR drowns the others."""
        width = jnp.maximum(params.max_snr_db - params.min_snr_db, 1e-3) / SNR_BINS
        index = jnp.clip((snr_db - params.min_snr_db) / width, 0, SNR_BINS - 1).astype(jnp.int32)
        member = jax.nn.one_hot(index, SNR_BINS, dtype=jnp.float32)
        counts = jnp.maximum(member.sum(0), 1.0)
        centred = advantages - (exact_matmul(advantages.mean(0), member) / counts)[index][None]
        deviation = jnp.sqrt(exact_matmul(jnp.square(centred).mean(0), member) / counts)
        return centred / (deviation[index][None] + 1e-8)

    def _values(self, model, moments: Moments, rollout: Rollout) -> Float[Array, "t n"]:
        return (
            rollout.baseline + model.critic(self._critic_standardised(rollout.obs, rollout.critic_obs, moments))[..., 0]
        )

    def _critic_standardised(self, obs, critic_obs, moments: Moments):
        size = obs.shape[-1]
        return jnp.concatenate([_standardise(obs, moments), critic_obs[..., size:]], axis=-1)

    def _minibatches(self, x: Float[Array, "t n *d"]) -> Float[Array, "m b *d"]:
        """Groups of environments, whole episodes each: one axis of minibatches, one of their samples."""
        groups = self.config.minibatches
        x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(groups, -1, *x.shape[3:])

    def _loss(self, weights, moments: Moments, part, clip, entropy_weight, value_weight):
        obs, critic_obs, offset, old_log_prob, baseline, advantages, targets = part
        model = nnx.merge(self.graph, weights)
        mean, log_std = model.actor(_standardise(obs, moments))
        error = (offset - mean) * jnp.exp(-log_std)
        log_prob = -0.5 * (jnp.square(error) + _LOG_2PI) - log_std
        ratio = jnp.exp(log_prob - old_log_prob)
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages).mean()
        value = baseline + model.critic(self._critic_standardised(obs, critic_obs, moments))[..., 0]
        # In units of the targets' own spread, so that the value loss weighs the same for any reward.
        value_loss = jnp.square(value - targets).mean() / (jnp.var(targets) + 1e-8)
        entropy = (0.5 * (1 + _LOG_2PI) + log_std).mean()
        loss = -gain + value_weight * value_loss - entropy_weight * entropy
        clipped = jnp.mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32))
        divergence = jnp.mean(ratio - 1 - jnp.log(ratio))
        return loss, {
            "loss": loss,
            "value_loss": value_loss,
            "std": jnp.exp(log_std).mean(),
            "clipped": clipped,
            "kl": divergence,
        }


def make_ppo(config: PPOConfig, env: PowerControl, params: EnvParams | None = None) -> Callable:
    """`train(key, params, hyper) -> (TrainState, metrics [u])`: the whole training as one jittable function.

    It vmaps over keys (seeds), over `EnvParams` and over `Hyperparameters`; both have defaults. ValueError for a
    configuration that does not fit.
    """
    ppo, default = PPO(config, env), env.default_params if params is None else params

    def train(
        key: Key[Array, ""], params: EnvParams = default, hyper: Hyperparameters = DEFAULTS
    ) -> tuple[TrainState, dict[str, Float[Array, " u"]]]:
        return jax.lax.scan(lambda state, _: ppo.update(state, params), ppo.init(key, hyper), None, config.num_updates)

    return train


def _standardise(obs: Float[Array, "*b o"], moments: Moments) -> Float[Array, "*b o"]:
    std = jnp.sqrt(moments.var) + STD_FLOOR
    return (obs - jnp.broadcast_to(moments.mean, obs.shape)) / jnp.broadcast_to(std, obs.shape)


def _merge(moments: Moments, obs: Float[Array, "t n o"]) -> Moments:
    """Moments with another rollout's, all counted alike (T. F. Chan et al., 1983)."""
    mean, var = obs.mean((0, 1)), obs.var((0, 1))
    count = moments.count + 1
    delta = mean - moments.mean
    merged = (moments.count * moments.var + var) / count + jnp.square(delta) * moments.count / jnp.square(count)
    return Moments(moments.mean + delta / count, merged, count)


def _gae(rewards: Float[Array, "t n"], values: Float[Array, "t n"], gae_lambda) -> tuple[Array, Array]:
    """Advantages and value targets at discount 1, the value after the last decision being 0."""
    following = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    errors = rewards + following - values

    def back(later, error):
        advantage = error + gae_lambda * later
        return advantage, advantage

    advantages = jax.lax.scan(back, jnp.zeros_like(errors[0]), errors, reverse=True)[1]
    return advantages, advantages + values
