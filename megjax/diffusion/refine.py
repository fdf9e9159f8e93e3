"""Denoising from any noise level: what a device does with a latent whose channel noise passes for diffusion noise."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from megjax.configs import require_count
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
) -> Float[Array, "b h w c"]:
    """Clean latents after `num_steps` DDIM steps from variance-preserving latents, each at its own noise level.

    The number of steps is static; their timesteps are spaced evenly from that of the level, which may be traced, down
    to zero, and the last step ends at alpha-bar 1. J. Song et al., "Denoising diffusion implicit models", 2021, eq. 12
    with sigma = 0. Levels below the schedule's last count as that one. Raises ValueError for fewer than one step.
    """
    num_steps = require_count("num_steps", num_steps)
    table = alphas_cumprod(config)
    lowest = max(float(table[-1]), 1e-4)  # at zero terminal SNR nothing of x0 could be recovered from epsilon
    first = jnp.clip(alpha_bar, lowest, 1 - 1e-6)
    start = timestep_of_level(table, first)

    def levels(i):
        """alpha-bar [b] at the input of step i; what lies above the table's first entry moves linearly to 1."""
        share = 1 - i / num_steps
        return jnp.where(i == 0, first, jnp.maximum(level_of_timestep(table, start * share), first))

    def wide(value):
        return value[:, None, None, None]

    def body(x, i):
        here, after = levels(i), jnp.where(i + 1 == num_steps, 1.0, levels(i + 1))
        output = denoiser(x, start * (1 - i / num_steps))
        (x0_x, x0_m), (eps_x, eps_m) = prediction_weights(config.prediction_type, here)
        clean = wide(x0_x) * x + wide(x0_m) * output
        noise = wide(eps_x) * x + wide(eps_m) * output
        return wide(jnp.sqrt(after)) * clean + wide(jnp.sqrt(1 - after)) * noise, None

    return jax.lax.scan(body, x.astype(jnp.float32), jnp.arange(num_steps, dtype=jnp.float32))[0]
