"""Denoising from any noise level: what a device does with a latent whose channel noise passes for diffusion noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from megjax.configs import require, require_count
from megjax.diffusion.sampler_types import SAMPLERS, SamplingMethod, SolverState, Steps, Weights
from megjax.diffusion.samplers.base import draw, weighted_sum
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod, prediction_weights


def timestep_of_level(table: Float[Array | np.ndarray, " n"], alpha_bar: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Real-valued training timestep whose alpha-bar is `alpha_bar`; linear in alpha-bar between timesteps, clipped.

    `table` is that of `alphas_cumprod`, falling.
    """
    rising = jnp.asarray(np.asarray(table)[::-1].copy(), jnp.float32)
    return jnp.interp(alpha_bar, rising, jnp.arange(rising.shape[0] - 1, -1, -1, dtype=jnp.float32))


def level_of_timestep(table: Float[Array | np.ndarray, " n"], timestep: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """alpha-bar at a real-valued timestep, the inverse of `timestep_of_level`."""
    table = jnp.asarray(np.asarray(table), jnp.float32)
    return jnp.interp(timestep, jnp.arange(table.shape[0], dtype=jnp.float32), table)


def refine(
    denoiser: Callable[[Float[Array, "b h w c"], Shaped[Array, "*b"]], Float[Array, "b h w c"]],
    config: SchedulerConfig,
    x: Float[Array, "b h w c"],
    alpha_bar: Float[Array, " b"],
    num_steps: int,
    sampler: str = "ddim",
    key: Key[Array, "*b"] | None = None,
) -> Float[Array, "b h w c"]:
    """Clean latents after `num_steps` steps from variance-preserving latents, each at its own noise level.

    Args:
      denoiser: (latents, timestep of each) -> the model's output of the config's prediction type.
      config: the model's noise schedule, and the settings that the sampler's class reads; x0 is not clipped.
      x: latents, variance preserving, at the levels `alpha_bar`, which may be traced. Levels below the schedule's last
        count as that one.
      num_steps: static; timesteps are spaced evenly from that of the level down to zero, and the last step ends at
        alpha-bar 1.
      sampler: a name of `SAMPLERS` whose sampler can start at any level, as those can whose steps are weighted sums.
      key: for stochastic samplers, one for the batch or one for each of its elements [b].

    Raises:
      ValueError: fewer than one step, a sampler that is unknown, that cannot start at any level or that cannot honour
        the config, or a stochastic one without a key.
    """
    num_steps = require_count("num_steps", num_steps)
    method, settings = _method(sampler), config.for_sampler(sampler)
    require(key is not None or not method.stochastic, "key", key, f"given, as sampler {sampler!r} draws noise")
    table = alphas_cumprod(config)
    lowest = max(float(table[-1]), 1e-4)  # at zero terminal SNR nothing of x0 could be recovered from epsilon
    first = jnp.clip(alpha_bar, lowest, 1 - 1e-6)
    start = timestep_of_level(table, first)

    def levels(i):
        """alpha-bar [b] at the input of step i; what lies above the table's first entry moves linearly to 1."""
        share = 1 - i / num_steps
        return jnp.where(i <= 0, first, jnp.maximum(level_of_timestep(table, start * share), first))

    def wide(value):
        return jnp.broadcast_to(value, first.shape)[:, None, None, None]

    def body(carry, index):
        x, state = carry
        i = index.astype(jnp.float32)
        here, after = levels(i), jnp.where(i + 1 == num_steps, 1.0, levels(i + 1))
        output = denoiser(x, start * (1 - i / num_steps))
        (x0_x, x0_m), (eps_x, eps_m) = prediction_weights(config.prediction_type, here)
        clean = wide(x0_x) * x + wide(x0_m) * output
        epsilon = wide(eps_x) * x + wide(eps_m) * output
        weights = method.weights(settings, Steps(index, num_steps, levels(i - 1), here, after), 0.0)
        noise = draw(key, index, x.shape) if method.stochastic else None
        return weighted_sum(Weights(*map(wide, weights)), state, clean, epsilon, noise), None

    state = SolverState(jnp.zeros((method.history, *x.shape), jnp.float32), jnp.zeros((), jnp.int32))
    return jax.lax.scan(body, (x.astype(jnp.float32), state), jnp.arange(num_steps, dtype=jnp.int32))[0][0]


def _method(sampler: str) -> SamplingMethod:
    """The record of a sampler; ValueError unless it is one that can start at any level."""
    method = SAMPLERS.find(sampler)
    able = ", ".join(known.name for known in SAMPLERS if known.any_level)
    require(method.any_level, "sampler", sampler, f"one that can start at any noise level: {able}")
    return method
