"""`PowerControl` as Gymnasium environments, one episode at a time or many, for other software to train on."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from megjax.configs import require, require_count
from megjax.keys import from_seed
from megjax.power.environment import EnvParams, EnvState, PowerControl, share_of_offset
from megjax.units import linear_to_db

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
    from gymnasium.vector.utils import batch_space
except ImportError:
    raise ImportError("megjax.power.adapters needs gymnasium: pip install gymnasium") from None

LARGEST_ACTION = 8.0
"""Actions lie within +- this: shares from exp(-8) of the planned one's odds to exp(8) times them."""


class GymnasiumPowerControl(gymnasium.Env):
    """One environment with Gymnasium's interface; an episode is one image over T fading blocks.

    The action [1] is the number `a` of `share_of_offset`, so 0 follows the plan, which for equal weights is the equal
    share. Infos tell the power of the block and the SNR of the episode. Episodes follow from the seed: that of `reset`,
    until then that of the constructor.
    """

    metadata = {"render_modes": []}

    def __init__(self, env: PowerControl, params: EnvParams, seed: int = 0):
        self.observation_space, self.action_space = _spaces(env)
        self._params, self._state = params, None
        self._reset, self._step = jax.jit(env.reset), jax.jit(lambda state, action: _step(env, state, action))
        super().reset(seed=seed)
        self._episodes = _Keys(self.np_random)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " o"], dict[str, Any]]:
        """First observation of a new episode; ValueError for options, as there are none."""
        require(not options, "options", options, "none")
        super().reset(seed=seed)
        if seed is not None:
            self._episodes = _Keys(self.np_random)
        obs, self._state = self._reset(self._episodes.draw(), self._params)
        return np.array(obs), {"snr_db": _snr_db(self._state)}

    def step(self, action: np.ndarray) -> tuple[Float[np.ndarray, " o"], float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated (never), info; ValueError for an action that is not a number.

        Gymnasium's `ResetNeeded` before the first reset and after the end of an episode.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("an episode begins with reset()")
        state = self._state
        obs, after, reward, done, power = self._step(state, _checked(action, self.action_space.shape)[0])
        self._state = None if done else after._replace(episode=state.episode)
        info = {"snr_db": _snr_db(state), "power": float(power)}
        return np.array(obs), float(reward), bool(done), False, info


class GymnasiumVectorPowerControl(gymnasium.vector.VectorEnv):
    """`num_envs` environments in one compiled program, with Gymnasium's vector interface and NumPy arrays.

    Actions [n 1] are as in `GymnasiumPowerControl`. All episodes end together, and `autoreset_mode` says what follows:

    - SAME_STEP: the step that ends them returns the first observations of new ones, with the last in
      `infos["final_obs"]`.
    - NEXT_STEP: the step after it begins new ones, whatever the actions, with rewards of 0.
    - DISABLED: the caller resets, all environments at once.
    """

    def __init__(
        self,
        env: PowerControl,
        params: EnvParams,
        num_envs: int,
        seed: int = 0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ):
        require_count("num_envs", num_envs)
        known = {mode.value: mode for mode in AutoresetMode} | {mode.name: mode for mode in AutoresetMode}
        mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else known.get(autoreset_mode)
        require(mode is not None, "autoreset_mode", autoreset_mode, f"one of {[mode.name for mode in AutoresetMode]}")
        self.metadata = {"render_modes": [], "autoreset_mode": mode}
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _spaces(env)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mode, self._params, self._state, self._ended = mode, params, None, False
        self._reset = jax.jit(
            lambda key, params: jax.vmap(env.reset, (0, None))(jax.random.split(key, num_envs), params)
        )
        self._step = jax.jit(jax.vmap(lambda state, action: _step(env, state, action)))
        super().reset(seed=seed)
        self._episodes = _Keys(self.np_random)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "n o"], dict[str, Any]]:
        """First observations of new episodes; ValueError for options other than a `reset_mask` of all environments."""
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, bool)))
        whole = mask.shape == (self.num_envs,) and mask.dtype == bool and bool(mask.all())
        require(whole, "options['reset_mask']", mask.tolist(), "true for all environments: their episodes end together")
        require(not options, "options", options, "none but reset_mask")
        super().reset(seed=seed)
        if seed is not None:
            self._episodes = _Keys(self.np_random)
        return self._begin()

    def step(
        self, actions: np.ndarray
    ) -> tuple[Float[np.ndarray, "n o"], Float[np.ndarray, " n"], np.ndarray, np.ndarray, dict[str, Any]]:
        """Observations, rewards, terminations, truncations (never), infos; errors as in `GymnasiumPowerControl`."""
        never = np.zeros(self.num_envs, bool)
        if self._ended and self._mode is AutoresetMode.NEXT_STEP:
            obs, infos = self._begin()
            return obs, np.zeros(self.num_envs, np.float32), never.copy(), never, infos
        if self._state is None:
            raise gymnasium.error.ResetNeeded("episodes begin with reset()")
        state = self._state
        obs, after, rewards, done, power = self._step(state, _checked(actions, self.action_space.shape)[:, 0])
        obs, rewards, done = np.array(obs), np.array(rewards), np.array(done)
        infos = {"power": np.asarray(power), "snr_db": _snr_db(state)}
        infos |= {f"_{name}": np.ones(self.num_envs, bool) for name in infos}
        self._ended = bool(done[0])
        if not self._ended:
            self._state = after._replace(episode=state.episode)
        elif self._mode is AutoresetMode.SAME_STEP:
            last = np.empty(self.num_envs, object)
            last[:] = list(obs)
            obs, fresh = self._begin()
            ended = {"final_obs": last, "_final_obs": done.copy(), "final_info": infos, "_final_info": done.copy()}
            infos = fresh | ended
        else:
            self._state = None
        return obs, rewards, done, never, infos

    def _begin(self) -> tuple[Float[np.ndarray, "n o"], dict[str, Any]]:
        obs, self._state = self._reset(self._episodes.draw(), self._params)
        self._ended = False
        return np.array(obs), {"snr_db": _snr_db(self._state), "_snr_db": np.ones(self.num_envs, bool)}


class _Keys:
    """A key for every episode from one number of Gymnasium's generator."""

    def __init__(self, rng: np.random.Generator):
        self.key, self.count = from_seed(int(rng.integers(2**31))), 0

    def draw(self) -> Key[Array, ""]:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


def _spaces(env: PowerControl) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """Of observations and of actions."""
    space = env.observation_space()
    observations = gymnasium.spaces.Box(space.low, space.high, space.shape, np.float32)
    return observations, gymnasium.spaces.Box(-LARGEST_ACTION, LARGEST_ACTION, (1,), np.float32)


def _step(env: PowerControl, state: EnvState, action: Float[Array, ""]):
    """Observation, state without its episode (which stays as it is), reward, done, power."""
    block = state.block
    share = share_of_offset(state.episode.features.share[block], action)
    obs, after, reward, done, _ = env.step_env(None, state, share, None)
    return obs, after._replace(episode=()), reward, done, after.power[block]


def _checked(action: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "*s"]:
    value = np.asarray(action, np.float32)
    valid = value.shape == shape and bool(np.all(np.isfinite(value)))
    require(valid, "action", action, f"finite numbers of shape {shape}")
    return value


def _snr_db(state: EnvState) -> Any:
    """1 / sigma^2 in dB of every episode, as NumPy has it."""
    return np.asarray(linear_to_db(state.episode.problem.snr))
