"""Noise levels that samplers visit: those of training timesteps, or sigmas between them."""

import numpy as np

from megjax.diffusion.sampler_types import Visits
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.schedules import alphas_cumprod


def discrete_visits(config: SchedulerConfig, timesteps: np.ndarray) -> Visits:
    """Model calls at training timesteps.

    A step spans num_train_timesteps // num_steps timesteps whatever the spacing, as in diffusers. What follows timestep
    0 is alpha-bar 1 with `config.set_alpha_to_one`, else alpha-bar of timestep 0.
    """
    timesteps = timesteps.astype(np.int64)
    span = config.num_train_timesteps // len(timesteps)
    return Visits(timesteps, alphas_cumprod(config)[timesteps], level_after(config, timesteps - span))


def level_after(config: SchedulerConfig, timesteps: np.ndarray) -> np.ndarray:
    """alpha-bar of training timesteps, those below 0 being the end of sampling."""
    table = alphas_cumprod(config)
    return np.where(timesteps >= 0, table[np.maximum(timesteps, 0)], 1.0 if config.set_alpha_to_one else table[0])


def sigma_visits(config: SchedulerConfig, timesteps: np.ndarray, karras_over_all: bool = False) -> Visits:
    """Model calls at the sigmas of these timesteps, sigma^2 = (1 - alpha-bar) / alpha-bar, and down to the final sigma.

    With `config.use_karras_sigmas`, sigmas are spaced between the ends as in T. Karras et al., 2022, eq. 5, where the
    config does not give the ends: between those of the timesteps, or, with `karras_over_all`, of all training
    timesteps.
    """
    table = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        table[-1] = 2.0**-24  # keeps the largest sigma finite: 4096, as in diffusers
    all_sigmas = np.sqrt((1 - table) / table)
    steps = np.arange(len(table))
    sigmas = np.interp(timesteps, steps, all_sigmas)
    if config.use_karras_sigmas:
        ends = all_sigmas[[-1, 0]] if karras_over_all else sigmas[[0, -1]]
        sigmas = _karras(config.sigma_max or ends[0], config.sigma_min or ends[1], len(timesteps))
        timesteps = np.interp(np.log(sigmas), np.log(all_sigmas), steps)
    levels = 1 / (1 + np.append(sigmas, all_sigmas[0] if config.final_sigmas_type == "sigma_min" else 0.0) ** 2)
    return Visits(timesteps, levels[:-1], levels[1:])


def _karras(sigma_max: float, sigma_min: float, num: int) -> np.ndarray:
    """Sigmas of Karras et al. 2022, eq. 5, with rho = 7."""
    rho = 7.0
    return (sigma_max ** (1 / rho) + np.linspace(0, 1, num) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
