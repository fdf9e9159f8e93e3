"""Power control trained by PPO as PureJaxRL does it: an automatically reset environment stepped inside one program.

C. Lu et al., "Discovered Policy Optimisation", 2022, whose code made this design widely used. Independent code: vmapped
environments in a scan, networks of the observation with one deviation for all states, GAE over episode ends, shuffled
minibatches, clipped objective and values, Adam with clipped gradients.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Key

from megjax.power.actor_critic import MLP
from megjax.power.environment import EnvParams, EnvState, PowerControl, share_of_offset
from megjax.power.ppo import DEFAULTS
from megjax.precision import promoting

NAME = "PureJaxRL-style loop"
_LOG_2PI = float(np.log(2 * np.pi))


class ActorCritic(nnx.Module):
    """Two perceptrons, and the logarithm of the deviation."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], rngs: nnx.Rngs):
        self.actor, self.critic = MLP(inputs, hidden, 1, rngs), MLP(inputs, hidden, 1, rngs)
        self.log_std = nnx.Param(jnp.zeros(()))

    def __call__(self, obs: Array) -> tuple[Array, Array, Array]:
        """Mean and log-deviation of the action, and the value."""
        return self.actor(obs)[..., 0], self.log_std[...], self.critic(obs)[..., 0]


class Transition(NamedTuple):
    """One step of every environment; over a rollout, with time first."""

    obs: Array
    action: Array
    log_prob: Array
    value: Array
    reward: Array
    done: Array


class RunState(NamedTuple):
    """State of the training loop between two updates: key, networks, optimiser and environments."""

    key: Key[Array, ""]
    params: Any
    opt_state: Any
    envs: EnvState
    obs: Array


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop for one environment; `update` is pure.

    With `every_step` the environment is gymnax's, whose `step` has a new episode ready every time; without it, resets
    happen only between rollouts, which must then be whole episodes.
    """

    env: PowerControl
    num_envs: int
    num_steps: int
    epochs: int
    minibatches: int
    hidden: tuple[int, ...]
    every_step: bool = True
    clip_norm: float = 0.5

    def init(self, key: Key[Array, ""], params: EnvParams) -> RunState:
        """The state before the first update."""
        key, network_key, env_key = jax.random.split(key, 3)
        weights = nnx.split(self._network(network_key))[1]
        obs, envs = self._reset(env_key, params)
        return RunState(key, weights, self._optimizer().init(weights), envs, obs)

    def update(self, state: RunState, params: EnvParams) -> tuple[RunState, dict[str, Array]]:
        """A rollout and the epochs over it."""
        graph = nnx.split(nnx.eval_shape(lambda: self._network(jax.random.key(0))))[0]
        key, rollout_key, epochs_key = jax.random.split(state.key, 3)
        envs, obs, batch = self._rollout(nnx.merge(graph, state.params), state, rollout_key, params)
        value = nnx.merge(graph, state.params)(obs)[2]
        advantages, targets = gae(batch, value, DEFAULTS.gae_lambda)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch, advantages, targets))
        optimize = promoting(self._optimizer().update)  # Adam raises a float to an integer power

        def minibatch(carry, part):
            weights, opt_state = carry
            loss, grads = jax.value_and_grad(lambda w: ppo_loss(nnx.merge(graph, w), *part))(weights)
            updates, opt_state = optimize(grads, opt_state)
            return (optax.apply_updates(weights, updates), opt_state), loss

        def epoch(carry, key):
            order = jax.random.permutation(key, self.num_envs * self.num_steps)
            parts = jax.tree.map(lambda x: x[order].reshape(self.minibatches, -1, *x.shape[1:]), flat)
            return jax.lax.scan(minibatch, carry, parts)

        carry = state.params, state.opt_state
        carry, losses = jax.lax.scan(epoch, carry, jax.random.split(epochs_key, self.epochs))
        episodes = jnp.maximum(batch.done.sum(), 1).astype(jnp.float32)
        return RunState(key, *carry, envs, obs), {"return": batch.reward.sum() / episodes, "loss": losses.mean()}

    def _network(self, key) -> ActorCritic:
        return ActorCritic(self.env.observation_space().shape[0], self.hidden, nnx.Rngs(key))

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adam(DEFAULTS.learning_rate, eps=1e-5))

    def _reset(self, key, params: EnvParams) -> tuple[Array, EnvState]:
        return jax.vmap(self.env.reset, (0, None))(jax.random.split(key, self.num_envs), params)

    def _rollout(self, model: ActorCritic, state: RunState, key, params: EnvParams):
        env = self.env

        def advance(key, envs, action):
            block = envs.block
            share = share_of_offset(envs.episode.features.share[block], action)
            if self.every_step:
                obs, envs, reward, done, *_ = env.step(key, envs, share, params)
            else:
                obs, envs, reward, done, _ = env.step_env(key, envs, share, params)
            return obs, envs, reward, done

        def step(carry, key):
            envs, obs = carry
            action_key, env_key = jax.random.split(key)
            mean, log_std, value = model(obs)
            action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
            keys = jax.random.split(env_key, self.num_envs)
            after_obs, envs, reward, done = jax.vmap(advance)(keys, envs, action)
            taken = Transition(obs, action, log_density(action, mean, log_std), value, reward, done)
            return (envs, after_obs), taken

        steps_key, reset_key = jax.random.split(key)
        start = state.envs, state.obs
        (envs, obs), batch = jax.lax.scan(step, start, jax.random.split(steps_key, self.num_steps))
        if not self.every_step:
            obs, envs = self._reset(reset_key, params)
        return envs, obs, batch


def log_density(action: Array, mean: Array, log_std: Array) -> Array:
    """Of a normal law."""
    return -0.5 * (jnp.square((action - mean) * jnp.exp(-log_std)) + _LOG_2PI) - log_std


def gae(batch: Transition, last_value: Array, gae_lambda: float) -> tuple[Array, Array]:
    """Generalised advantage estimates at discount 1, and the targets of the values."""

    def back(carry, row):
        later, following = carry
        going = 1.0 - row.done.astype(jnp.float32)
        later = row.reward + following * going - row.value + gae_lambda * going * later
        return (later, row.value), later

    start = jnp.zeros_like(last_value), last_value
    advantages = jax.lax.scan(back, start, batch, reverse=True, unroll=16)[1]
    return advantages, advantages + batch.value


def ppo_loss(model: ActorCritic, part: Transition, advantages: Array, targets: Array) -> Array:
    """Clipped objective, clipped value loss, entropy bonus."""
    mean, log_std, value = model(part.obs)
    log_ratio = log_density(part.action, mean, log_std) - part.log_prob
    ratio, clip = jnp.exp(log_ratio), DEFAULTS.clip
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages).mean()
    near = part.value + jnp.clip(value - part.value, -clip, clip)
    value_loss = 0.5 * jnp.maximum(jnp.square(value - targets), jnp.square(near - targets)).mean()
    entropy = 0.5 * (1 + _LOG_2PI) + log_std
    return -gain + DEFAULTS.value_weight * value_loss - DEFAULTS.entropy * entropy
