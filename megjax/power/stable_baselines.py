"""`PowerControl` as a vector environment of stable-baselines3."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from megjax.power.adapters import GymnasiumVectorPowerControl
from megjax.power.environment import EnvParams, PowerControl

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError:
    raise ImportError("megjax.power.stable_baselines needs stable-baselines3: pip install stable-baselines3") from None


class StableBaselinesPowerControl(VecEnv):
    """`num_envs` environments in one compiled program, as stable-baselines3's `VecEnv`.

    Actions and observations are those of `GymnasiumVectorPowerControl`. All episodes end together, and the step that
    ends them returns the first observations of new ones. Infos are filled at that step only: `terminal_observation`,
    `snr_db` of the episode, and `TimeLimit.truncated`, which is false.
    """

    def __init__(self, env: PowerControl, params: EnvParams, num_envs: int, seed: int = 0):
        self.envs, self.actions = GymnasiumVectorPowerControl(env, params, num_envs, seed), None
        super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self) -> Float[np.ndarray, "n o"]:
        """First observations of new episodes; they follow from the seed given to `seed`, if it was called."""
        obs, infos = self.envs.reset(seed=self._seeds[0])
        self.reset_infos = [{"snr_db": float(snr_db)} for snr_db in infos["snr_db"]]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions [n 1] of the next `step_wait`."""
        self.actions = actions

    def step_wait(
        self,
    ) -> tuple[Float[np.ndarray, "n o"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"], list[dict[str, Any]]]:
        """Observations, rewards, dones, infos; ValueError for actions that are not finite numbers [n 1]."""
        obs, rewards, done, _, infos = self.envs.step(self.actions)
        if not done[0]:
            return obs, rewards, done, [{} for _ in range(self.num_envs)]
        told = zip(infos["final_obs"], infos["final_info"]["snr_db"], strict=True)
        named = ("terminal_observation", "snr_db", "TimeLimit.truncated")
        return obs, rewards, done, [dict(zip(named, (last, float(snr), False), strict=True)) for last, snr in told]

    def close(self) -> None:
        """Nothing is held open."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the Gymnasium vector environment, once for every environment asked for."""
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise NotImplementedError: the environments are one program with one set of attributes."""
        raise NotImplementedError("attributes of single environments cannot be set: they are one compiled program")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Raise NotImplementedError: the environments are one program without methods of their own."""
        raise NotImplementedError("single environments have no methods: they are one compiled program")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """False for every environment asked for."""
        return [False for _ in self._get_indices(indices)]
