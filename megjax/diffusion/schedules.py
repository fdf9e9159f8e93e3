"""Noise schedules: alpha-bar tables, the timesteps of samplers, predictions and the forward process."""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.diffusion.sampler_types import SAMPLERS
from megjax.diffusion.scheduler_config import PREDICTION_TYPES, SchedulerConfig, reject


def betas(config: SchedulerConfig) -> Float[np.ndarray, "t"]:
    """Variances beta_t of the forward process before any zero-SNR rescaling, float64 [num_train_timesteps].

    `squaredcos_cap_v2` is the cosine schedule of Nichol and Dhariwal (2021), eq. 17, capped at 0.999.
    """
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def alphas_cumprod(config: SchedulerConfig) -> Float[np.ndarray, "t"]:
    """alpha-bar_t, the signal power left at training timestep t, float64 [num_train_timesteps].

    At zero terminal SNR (`config.zero_terminal_snr`), sqrt(alpha-bar) is shifted and scaled so that the last entry is
    exactly zero and the first unchanged (Lin et al. 2024, "Common diffusion noise schedules and sample steps are
    flawed", algorithm 1).
    """
    alpha_bar = np.cumprod(1 - betas(config))
    if not config.zero_terminal_snr:
        return alpha_bar
    root = np.sqrt(alpha_bar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def inference_timesteps(config: SchedulerConfig, num_steps: int) -> Float[np.ndarray, "n"]:
    """Decreasing timesteps of the steps of `config.sampler` (see `for_sampler`), float64 [num_steps].

    Raises:
      ValueError: `num_steps` is not an integer in [1, num_train_timesteps], or the timesteps it gives repeat or leave
        the training range; a class that has no sampler here.
    """
    method, train_steps = SAMPLERS.find(config.sampler), config.num_train_timesteps
    try:
        num_steps = operator.index(num_steps)
    except TypeError:
        reject("num_steps", num_steps, "an integer")
    if not 1 <= num_steps <= train_steps:
        reject("num_steps", num_steps, f"in [1, {train_steps}]")
    points = num_steps + method.spare_timestep
    if config.timestep_spacing == "trailing":
        # arange, whose rounding decides ties such as 937.5, because diffusers takes the same
        timesteps = np.round(np.arange(train_steps, 0, -train_steps / num_steps)[:num_steps]) - 1
    elif config.timestep_spacing == "leading":
        timesteps = (np.arange(points) * (train_steps // points))[::-1][:num_steps] + float(config.steps_offset)
    else:
        timesteps = np.linspace(0, train_steps - 1, points)[::-1][:num_steps]
        if not method.fractional_timesteps:
            timesteps = np.round(timesteps)
    if timesteps[0] > train_steps - 1 or np.any(np.diff(timesteps) >= 0):
        spacing = f"timestep_spacing={config.timestep_spacing!r} and steps_offset={config.steps_offset}"
        reject("num_steps", num_steps, f"fewer with {spacing}: timesteps must not repeat or exceed {train_steps - 1}")
    return timesteps


def prediction_weights(prediction_type: str, alpha_bar: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weights ((x0_x, x0_m), (eps_x, eps_m)) with x0 = x0_x x + x0_m m and eps = eps_x x + eps_m m.

    m is the model's output for x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps: eps itself ("epsilon"),
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 ("v_prediction"; Salimans and Ho 2022, appendix D), or x0
    ("sample"). `alpha_bar` may be a NumPy or JAX array.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    zero, one = 0 * alpha_bar, 0 * alpha_bar + 1
    if prediction_type == "epsilon":
        return (1 / signal, -noise / signal), (zero, one)
    if prediction_type == "v_prediction":
        return (signal, -noise), (noise, signal)
    if prediction_type == "sample":
        return (zero, one), (1 / noise, -signal / noise)
    reject("prediction_type", prediction_type, f"one of {PREDICTION_TYPES}")


def predict_x0(
    prediction_type: str,
    x: Float[Array, "b *d"],
    model_output: Float[Array, "b *d"],
    alpha_bar: Float[Array, ""] | float,
) -> Float[Array, "b *d"]:
    """The clean latent implied by the model's output at a variance-preserving `x` of noise level `alpha_bar`."""
    (of_x, of_output), _ = prediction_weights(prediction_type, jnp.asarray(alpha_bar, jnp.float32))
    return of_x * x + of_output * model_output


def predict_epsilon(
    prediction_type: str,
    x: Float[Array, "b *d"],
    model_output: Float[Array, "b *d"],
    alpha_bar: Float[Array, ""] | float,
) -> Float[Array, "b *d"]:
    """The noise implied by the model's output at a variance-preserving `x` of noise level `alpha_bar`."""
    _, (of_x, of_output) = prediction_weights(prediction_type, jnp.asarray(alpha_bar, jnp.float32))
    return of_x * x + of_output * model_output


def add_noise(
    alpha_bars: Float[np.ndarray, "train"],
    z: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """The forward process q(z_t | z_0): sqrt(alpha-bar_t) z + sqrt(1 - alpha-bar_t) noise (Ho et al. 2020, eq. 4).

    `alpha_bars` is the host table of `alphas_cumprod`; `t` holds training timesteps, one per example.
    """
    signal, spread = _forward_weights(alpha_bars, z, t)
    return signal * z + spread * noise


def velocity(
    alpha_bars: Float[np.ndarray, "train"],
    z: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b *d"]:
    """The target of v-prediction: sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) z (Salimans and Ho 2022).

    Arguments as in `add_noise`.
    """
    signal, spread = _forward_weights(alpha_bars, z, t)
    return signal * noise - spread * z


def _forward_weights(alpha_bars: np.ndarray, z: Array, t: Array) -> tuple[Array, Array]:
    # Roots are taken before the cast: 1 - alpha-bar_0 is of order 1e-4 and would lose four digits in float32.
    table = np.asarray(alpha_bars, np.float64)
    shape = t.shape + (1,) * (z.ndim - t.ndim)
    return tuple(jnp.asarray(root, jnp.float32)[t].reshape(shape) for root in (np.sqrt(table), np.sqrt(1 - table)))
