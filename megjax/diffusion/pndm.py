"""PNDM's own tables: which outputs each step combines, where it starts from, and the timesteps it visits."""

import numpy as np
from jaxtyping import Float, Int, Shaped

from megjax.diffusion.scheduler_config import SchedulerConfig, reject
from megjax.diffusion.schedules import prediction_weights

RUNGE_KUTTA_CALLS = 12  # three steps of four model calls each
MULTISTEP_CALLS = 2  # a step, and the same step again with the mean of both outputs

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
PLANS = {
    MULTISTEP_CALLS: _MULTISTEP,
    RUNGE_KUTTA_CALLS: np.concatenate([np.tile(_RUNGE_KUTTA, (3, 1)), _MULTISTEP[-1:]]),
}
"""The rows by how many calls are special, which is the length of `start_weights`."""


def visited(config: SchedulerConfig, timesteps: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Timesteps of the model calls, of which there are more than steps.

    The second one comes twice. With Runge-Kutta steps, each of the first three calls the model at its start, twice
    half-way to the next timestep, and there.

    Raises:
      ValueError: fewer than four steps, of which three are Runge-Kutta steps.
    """
    if config.skip_prk_steps:
        return np.insert(timesteps, 1, timesteps[1]) if len(timesteps) > 1 else timesteps
    if len(timesteps) < 4:
        reject("num_steps", len(timesteps), "at least 4 for sampler 'pndm' with skip_prk_steps=False")
    half = config.num_train_timesteps // len(timesteps) // 2
    first = [[t, after + half, after + half, after] for t, after in zip(timesteps[:3], timesteps[1:4], strict=True)]
    return np.concatenate([*map(np.asarray, first), timesteps[3:]])


def start_weights(
    config: SchedulerConfig,
    calls: Int[np.ndarray, " m"],
    span: int,
    table: Float[np.ndarray, " t"],
    final: Shaped[np.ndarray, ""] | float,
) -> Float[np.ndarray, "k m 2"]:
    """Weights of the step's first latents and of the combined output in the latents after each of the first k calls.

    The c-th call since the start takes row c at the call's own timestep, as diffusers' class does, which counts calls:
    a solver that starts later repeats its second step, and takes its Runge-Kutta steps from the first timesteps of all.
    `span` is how many timesteps a step moves, `table` that of alpha-bar, and `final` what follows its first entry.
    """
    here = np.asarray(calls)
    if config.skip_prk_steps:
        pairs = [(here, here - span), (np.minimum(here + span, len(table) - 1), here)]
    else:
        starts = np.repeat(here[:RUNGE_KUTTA_CALLS:4], 4)
        pairs = [(np.full_like(here, t), here if c % 2 else here - span // 2) for c, t in enumerate(starts)]
    weights = []
    for source, target in pairs:
        after = np.where(target >= 0, table[np.maximum(target, 0)], final)
        of_x0, of_epsilon = prediction_weights(config.prediction_type, table[source])
        signal, noise = after**0.5, (1 - after) ** 0.5
        weights.append(
            np.stack([signal * x0 + noise * epsilon for x0, epsilon in zip(of_x0, of_epsilon, strict=True)], 1)
        )
    return np.stack(weights)
