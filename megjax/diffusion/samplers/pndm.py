"""PNDM: Adams-Bashforth steps on past model outputs, begun by Runge-Kutta steps or by a step that is corrected."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.diffusion.sampler_types import SAMPLERS, Sampler, SamplingMethod, SolverState, Visits
from megjax.diffusion.samplers.base import predictions
from megjax.diffusion.samplers.levels import level_after
from megjax.diffusion.scheduler_config import SchedulerConfig, reject
from megjax.diffusion.schedules import alphas_cumprod, prediction_weights

_RUNGE_KUTTA_CALLS = 12  # three steps of four model calls each
_MULTISTEP_CALLS = 2  # a step, and the same step again with the mean of both outputs

# A row for each model call since the start, the last one for all that follow: weights of the output, of the last three
# and of the running sum; what is kept of that sum and what the output adds to it; and 1 where a step begins, which
# remembers the output and starts from the current latents, 0 where it still starts from the ones remembered.
# Adams-Bashforth weights: Liu et al. 2022 (PNDM), eq. 9 and appendix; the first step is a plain DDIM step.
_MULTISTEP = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 1],
        [1 / 2, 1 / 2, 0, 0, 0, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0, 0, 0, 0, 1],
        [23 / 12, -16 / 12, 5 / 12, 0, 0, 0, 0, 1],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0, 0, 0, 1],
    ]
)
# The classical Runge-Kutta weights 1/6, 1/3, 1/3, 1/6: eq. 13 there.
_RUNGE_KUTTA = np.array(
    [
        [1, 0, 0, 0, 0, 0, 1 / 6, 1],
        [1, 0, 0, 0, 0, 1, 1 / 3, 0],
        [1, 0, 0, 0, 0, 1, 1 / 3, 0],
        [1 / 6, 0, 0, 0, 1, 0, 0, 0],
    ]
)
_PLANS = {
    _MULTISTEP_CALLS: _MULTISTEP,
    _RUNGE_KUTTA_CALLS: np.concatenate([np.tile(_RUNGE_KUTTA, (3, 1)), _MULTISTEP[-1:]]),
}
"""Rows by how many calls are special, which is the length of the table "start_weights"."""


def pndm_visits(config: SchedulerConfig, timesteps: Float[np.ndarray, " n"]) -> Visits:
    """Model calls, of which there are more than steps, and the weights "start_weights" [k m 2] of the first k calls.

    The second call comes twice. With Runge-Kutta steps, each of the first three calls the model at its start, twice
    half-way to the next timestep, and there.

    Raises:
      ValueError: fewer than four steps, of which three are Runge-Kutta steps.
    """
    timesteps = timesteps.astype(np.int64)
    span = config.num_train_timesteps // len(timesteps)
    if config.skip_prk_steps:
        calls = np.insert(timesteps, 1, timesteps[1]) if len(timesteps) > 1 else timesteps
    else:
        if len(timesteps) < 4:
            reject("num_steps", len(timesteps), "at least 4 for sampler 'pndm' with skip_prk_steps=False")
        half = span // 2
        first = [[t, after + half, after + half, after] for t, after in zip(timesteps[:3], timesteps[1:4], strict=True)]
        calls = np.concatenate([*map(np.asarray, first), timesteps[3:]])
    extra = {"start_weights": _start_weights(config, calls, span)}
    return Visits(calls, alphas_cumprod(config)[calls], level_after(config, calls - span), extra)


def _start_weights(config: SchedulerConfig, calls: Int[np.ndarray, " m"], span: int) -> Float[np.ndarray, "k m 2"]:
    """Weights of the step's first latents and of the combined output in the latents after each of the first k calls.

    The c-th call since the start takes row c at the call's own timestep, as diffusers' class does, which counts calls:
    a solver that starts later repeats its second step, and takes its Runge-Kutta steps from the first timesteps of all.
    `span` is how many timesteps a step moves.
    """
    table = alphas_cumprod(config)
    if config.skip_prk_steps:
        pairs = [(calls, calls - span), (np.minimum(calls + span, len(table) - 1), calls)]
    else:
        starts = np.repeat(calls[:_RUNGE_KUTTA_CALLS:4], 4)
        pairs = [(np.full_like(calls, t), calls if c % 2 else calls - span // 2) for c, t in enumerate(starts)]
    weights = []
    for source, target in pairs:
        after = level_after(config, target)
        of_x0, of_epsilon = prediction_weights(config.prediction_type, table[source])
        signal, noise = after**0.5, (1 - after) ** 0.5
        weights.append(
            np.stack([signal * x0 + noise * epsilon for x0, epsilon in zip(of_x0, of_epsilon, strict=True)], 1)
        )
    return np.stack(weights)


def pndm_step(
    sampler: Sampler, state: SolverState, output: Array, i: Any, x: Array, noise: Array | None
) -> tuple[Array, SolverState]:
    """A step by L. Liu et al., "Pseudo numerical methods for diffusion models on manifolds", 2022, eqs. 11 to 13.

    The transfer part is the DDIM step. `state` holds the last three model outputs, newest first, the input of the step
    they belong to, and the sum of outputs in a Runge-Kutta step. The second step since a fresh state only corrects the
    first, as if both had the timesteps of steps 0 and 1, and Runge-Kutta steps are always those from the first
    timestep: so does diffusers where image-to-image generation starts late. `noise` is not read.
    """
    start = jnp.asarray(sampler.extra["start_weights"])
    past, special = state.history, start.shape[0]
    plan = jnp.asarray(_PLANS[special], jnp.float32)
    row = plan[jnp.minimum(state.count, plan.shape[0] - 1)]
    begins, total = row[7] > 0, past[4]
    combined = row[0] * output + row[1] * past[0] + row[2] * past[1] + row[3] * past[2] + row[4] * total
    base = jnp.where(begins, x, past[3])
    x0, epsilon = predictions(sampler, i, base, combined)
    to, first = jnp.asarray(sampler.output_weights)[i], start[jnp.minimum(state.count, special - 1), i]
    result = jnp.where(state.count < special, first[0] * base + first[1] * combined, to[0] * x0 + to[1] * epsilon)
    outputs = jnp.where(begins, jnp.stack([output, past[0], past[1]]), past[:3])
    history = jnp.concatenate([outputs, base[None], (row[5] * total + row[6] * output)[None]])
    return result, SolverState(history=history, count=state.count + 1)


SAMPLERS.register(
    SamplingMethod(
        name="pndm",
        title="PNDM",
        version=1,
        rank=20,
        class_name="PNDMScheduler",
        settings={"set_alpha_to_one": None, "skip_prk_steps": None},
        defaults={"timestep_spacing": "leading", "set_alpha_to_one": False},
        refused_predictions=("sample",),
        history=5,
        visits=pndm_visits,
        step=pndm_step,
    )
)
