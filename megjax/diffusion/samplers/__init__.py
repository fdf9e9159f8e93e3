"""Samplers, a family a file, each with the record that names it; `SAMPLERS` lists them."""

from megjax.diffusion.sampler_types import (
    SAMPLERS,
    Sampler,
    SamplingMethod,
    SolverState,
    Steps,
    Visits,
    Weights,
    first_order,
)
from megjax.diffusion.samplers.base import (
    alpha_bar,
    denoise,
    from_vp,
    init_state,
    make_sampler,
    predictions,
    scale_initial,
    scale_input,
    step,
    to_vp,
)
from megjax.diffusion.samplers.levels import discrete_visits, sigma_visits

__all__ = [
    "SAMPLERS",
    "Sampler",
    "SamplingMethod",
    "SolverState",
    "Steps",
    "Visits",
    "Weights",
    "alpha_bar",
    "denoise",
    "discrete_visits",
    "first_order",
    "from_vp",
    "init_state",
    "make_sampler",
    "predictions",
    "scale_initial",
    "scale_input",
    "sigma_visits",
    "step",
    "to_vp",
]
