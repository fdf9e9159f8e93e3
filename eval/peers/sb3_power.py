"""Power control trained by stable-baselines3's PPO on the vector adapter; importing this needs stable-baselines3."""

import time
from collections.abc import Callable

import torch
from stable_baselines3 import PPO
from torch import nn

from megjax.power.environment import EnvParams, PowerControl
from megjax.power.ppo import DEFAULTS
from megjax.power.stable_baselines import StableBaselinesPowerControl

NAME = "stable-baselines3"


def make_agent(
    env: PowerControl,
    params: EnvParams,
    num_envs: int,
    num_steps: int,
    epochs: int,
    minibatches: int,
    hidden: tuple[int, ...],
) -> PPO:
    """An agent with megjax's learning rate and coefficients, and tanh networks of these layers for actor and critic."""
    return PPO(
        "MlpPolicy",
        StableBaselinesPowerControl(env, params, num_envs),
        learning_rate=DEFAULTS.learning_rate,
        n_steps=num_steps,
        batch_size=num_envs * num_steps // minibatches,
        n_epochs=epochs,
        gamma=1.0,
        gae_lambda=DEFAULTS.gae_lambda,
        clip_range=DEFAULTS.clip,
        ent_coef=DEFAULTS.entropy,
        vf_coef=DEFAULTS.value_weight,
        max_grad_norm=0.5,
        policy_kwargs={"net_arch": list(hidden), "activation_fn": nn.Tanh},
        seed=0,
        device="cpu",  # faster than a GPU for networks of this size, as its documentation says
    )


def training(env: PowerControl, params: EnvParams, num_envs: int, num_steps: int, **shape) -> Callable[[], float]:
    """A call that makes one rollout of `num_steps` in every environment and the epochs over it.

    It runs on one thread or on PyTorch's default number, whichever is faster: threads that wait for each other at every
    small operation are many times slower than one where other programs want the cores too.
    """
    agent = make_agent(env, params, num_envs, num_steps, **shape)

    def update(threads: int) -> float:
        before, start = torch.get_num_threads(), time.perf_counter()
        torch.set_num_threads(threads)
        agent.learn(num_envs * num_steps, reset_num_timesteps=False)
        torch.set_num_threads(before)
        return time.perf_counter() - start

    update(1)
    best = min((1, torch.get_num_threads()), key=update)
    return lambda: update(best)
