"""Recipes of power-policy training: environment, its parameters, PPO, and the run that follows them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from megjax.channel import Fading, RayleighFading
from megjax.configs import require
from megjax.keys import from_seed
from megjax.power.actor_critic import LearnedPower
from megjax.power.environment import EnvParams, PowerControl
from megjax.power.ppo import PPO, Hyperparameters, PPOConfig, TrainState
from megjax.training import own, run_loop, shared


@dataclasses.dataclass(frozen=True)
class PowerRecipe:
    """Everything that decides what a trained policy becomes, but the weights of the blocks.

    SNRs (1 / sigma^2, dB) are uniform from `min_snr_db` to `max_snr_db`; `weight_spread` is the deviation of a
    log-normal factor on every weight; `history` past gains are observed.
    """

    num_blocks: int = 16
    history: int = 0
    fading: Fading = RayleighFading()
    min_snr_db: float = -12.0
    max_snr_db: float = 22.0
    weight_spread: float = 0.0
    ppo: PPOConfig = PPOConfig()
    hyper: Hyperparameters = Hyperparameters()
    seed: int = 0
    updates_per_dispatch: int = 5
    checkpoint_minutes: float = 1.0

    def __post_init__(self):
        require(self.updates_per_dispatch >= 1, "updates_per_dispatch", self.updates_per_dispatch, "at least 1")
        require(self.checkpoint_minutes >= 0, "checkpoint_minutes", self.checkpoint_minutes, "at least 0")

    def environment(
        self, weights: Float[ArrayLike, "*k t"] | None = None, weight_grid_db: Float[ArrayLike, " s"] | None = None
    ) -> tuple[PowerControl, EnvParams]:
        """The environment and its parameters; `weights` as in `PowerControl.make_params`."""
        env = PowerControl(self.num_blocks, self.history)
        params = env.make_params(
            self.fading, (self.min_snr_db, self.max_snr_db), weights, weight_grid_db, self.weight_spread
        )
        return env, params


PRESETS = {
    "default": PowerRecipe(),
    "tiny": PowerRecipe(ppo=PPOConfig(num_envs=64, num_updates=4, minibatches=2, hidden=(8,)), updates_per_dispatch=2),
}


def train_power(
    recipe: PowerRecipe,
    env: PowerControl,
    params: EnvParams,
    folder: Path,
    *,
    start: LearnedPower | None = None,
    on_checkpoint: Callable[[TrainState], None] | None = None,
    description: dict[str, Any] | None = None,
) -> LearnedPower:
    """Train in `env`; resumes from `folder`, to the bit. `start` is a policy to go on from, with its standardisation.
    `on_checkpoint` is called after each save. Of many processes all compute the same.

    Raises ValueError if `folder` holds a run of another recipe, or weights, or `start` is for another environment.
    """
    ppo = PPO(recipe.ppo, env)
    state = jax.jit(ppo.init)(from_seed(recipe.seed), recipe.hyper)
    if start is not None:
        state = ppo.start_from(state, start)
    state = shared(state)
    update = jax.jit(lambda state, params, num: _several(ppo, state, params, num), static_argnums=2, donate_argnums=0)
    described = dataclasses.asdict(recipe) | {"start": start is not None} | (description or {})
    described |= {"fading": repr(recipe.fading), "weights": np.asarray(params.weights).tolist()}
    del described["checkpoint_minutes"], described["updates_per_dispatch"]
    final: TrainState = run_loop(
        lambda state, num: update(state, params, num),
        state,
        folder,
        num_steps=recipe.ppo.num_updates,
        per_dispatch=recipe.updates_per_dispatch,
        log_every=recipe.updates_per_dispatch,
        checkpoint_minutes=recipe.checkpoint_minutes,
        parameters=state.params,
        description=described,
        on_checkpoint=on_checkpoint,
    )
    return ppo.policy(own(final), params)


def _several(ppo: PPO, state: TrainState, params: EnvParams, num: int):
    state, metrics = jax.lax.scan(lambda s, _: ppo.update(s, params), state, None, num)
    return state, jax.tree.map(lambda x: x.mean(0), metrics)
