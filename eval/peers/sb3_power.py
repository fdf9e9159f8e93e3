"""Power control trained by stable-baselines3's PPO on the vector adapter; importing this needs stable-baselines3."""

import time
from collections.abc import Callable

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from megjax.power.adapters import GymnasiumVectorPowerControl
from megjax.power.environment import EnvParams, PowerControl
from megjax.power.ppo import DEFAULTS

NAME = "stable-baselines3"


class Bridge(VecEnv):
    """A Gymnasium vector environment as stable-baselines3 has them: no infos, so nothing is spent on them."""

    def __init__(self, envs: GymnasiumVectorPowerControl):
        self.envs, self.actions = envs, None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.infos = [{} for _ in range(self.num_envs)]

    def reset(self) -> np.ndarray:
        obs, _ = self.envs.reset(seed=self._seeds[0])
        self._reset_seeds()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        obs, rewards, done, _, _ = self.envs.step(self.actions)
        return obs, rewards, done, self.infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices=None) -> list:
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value, indices=None) -> None:
        raise NotImplementedError("the environments are one")

    def env_method(self, method_name: str, *args, indices=None, **kwargs) -> list:
        raise NotImplementedError("the environments are one")

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


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
        Bridge(GymnasiumVectorPowerControl(env, params, num_envs)),
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
