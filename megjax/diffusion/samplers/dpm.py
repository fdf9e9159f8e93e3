"""DPM-Solver++(2M): second-order multi-step solution in half log-SNR."""

import math

import numpy as np

from megjax.diffusion.sampler_types import (
    SAMPLERS,
    SIGMA_SPACINGS,
    THRESHOLDING,
    SamplingMethod,
    Steps,
    Visits,
    Weights,
    first_order,
)
from megjax.diffusion.samplers.levels import sigma_visits
from megjax.diffusion.scheduler_config import SchedulerConfig


def dpm_visits(config: SchedulerConfig, timesteps: np.ndarray) -> Visits:
    """Model calls at the sigmas of these timesteps, or at Karras's, which span those of all training timesteps."""
    visits = sigma_visits(config, timesteps, karras_over_all=True)
    if config.use_karras_sigmas and config.beta_schedule != "squaredcos_cap_v2":
        # The cast to integers cuts those of the cosine schedule, as in diffusers.
        visits = visits._replace(timesteps=np.round(visits.timesteps))
    return visits


def dpm_weights(config: SchedulerConfig, steps: Steps, eta: float) -> Weights:
    """Weights of the first-order step and, beyond the first, of the change of x0.

    The latter is alpha_t (1 - exp(-h_i)) / (2 r_i) with r_i = h_{i-1} / h_i, h being steps of half log-SNR: C. Lu et
    al., "DPM-Solver++: Fast solver for guided sampling of diffusion probabilistic models", 2022, algorithm 2. It is
    zero where the config asks for a step of first order, and in a step to alpha-bar 1.
    """
    xp = steps.xp
    second = (steps.index > 0) & (steps.after < 1) & (steps.before < steps.here)
    if config.euler_at_final or (config.lower_order_final and steps.num_steps < 15):
        second &= steps.index < steps.num_steps - 1
    if config.solver_order == 1:
        second &= False
    # First-order steps take levels whose logarithms, and the gradients of these, are finite.
    safe = (steps.before, 0.25), (steps.here, 0.5), (steps.after, 0.75)
    levels = [xp.where(second, level, stand_in) for level, stand_in in safe]
    before, here, after = (0.5 * (xp.log(level) - xp.log1p(-level)) for level in levels)
    h = after - here
    change = -0.5 * xp.expm1(-h) * h / (here - before) * xp.sqrt(levels[2])
    return first_order(config, steps, eta)._replace(change=xp.where(second, change, 0.0))


SAMPLERS.register(
    SamplingMethod(
        name="dpm++",
        title="DPM-Solver++",
        version=1,
        rank=50,
        class_name="DPMSolverMultistepScheduler",
        settings={
            "rescale_betas_zero_snr": None,
            "use_lu_lambdas": (False, None),
            "use_flow_sigmas": (False, None),
            "flow_shift": None,
            "use_dynamic_shifting": (False, None),
            "time_shift_type": None,
            "solver_order": (1, 2),
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "algorithm_type": ("dpmsolver++", "deis"),  # diffusers takes names of another class's solvers for its own
            "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            "lambda_min_clipped": (-math.inf, "-Infinity"),
            "lower_order_final": None,
            "euler_at_final": None,
            "final_sigmas_type": ("zero", "sigma_min"),
            **SIGMA_SPACINGS,
            **THRESHOLDING,
        },
        settings_of_others=("sigma_min", "sigma_max"),
        spare_timestep=True,
        history=1,
        visits=dpm_visits,
        weights=dpm_weights,
    )
)
