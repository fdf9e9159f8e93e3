"""Euler's method in sigma space, deterministic and ancestral."""

from megjax.diffusion.sampler_types import SAMPLERS, SIGMA_SPACINGS, SamplingMethod, Steps, Weights
from megjax.diffusion.samplers.levels import sigma_visits
from megjax.diffusion.scheduler_config import SchedulerConfig


def ancestral_weights(config: SchedulerConfig, steps: Steps, eta: float) -> Weights:
    """Weights of a step down to sigma_to^2 / sigma_from, and of the noise that takes it up to sigma_to.

    This is the ancestral form of k-diffusion; written for variance-preserving latents so that it has a derivative
    where sigma_to = 0.
    """
    xp, here, after = steps.xp, steps.here, steps.after
    ratio = (1 - after) / after * here / (1 - here)  # of the squares of sigma_to and sigma_from
    down = (1 - after) * xp.sqrt(here / after / (1 - here))
    return Weights(xp.sqrt(after), down, xp.sqrt(1 - after) * xp.sqrt(xp.maximum(1 - ratio, 0)))


# T. Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, algorithm 2 without
# churn and without its second-order correction.
SAMPLERS.register(
    SamplingMethod(
        name="euler",
        title="Euler",
        version=1,
        rank=30,
        class_name="EulerDiscreteScheduler",
        settings={
            "rescale_betas_zero_snr": None,
            "sigma_min": None,
            "sigma_max": None,
            "final_sigmas_type": ("zero", "sigma_min"),
            "interpolation_type": ("linear",),
            "timestep_type": ("discrete",),
            **SIGMA_SPACINGS,
        },
        fractional_timesteps=True,
        sigma_space=True,
        visits=sigma_visits,
    )
)
SAMPLERS.register(
    SamplingMethod(
        name="euler_ancestral",
        title="Euler ancestral",
        version=1,
        rank=40,
        class_name="EulerAncestralDiscreteScheduler",
        settings={"rescale_betas_zero_snr": None},
        refused_predictions=("sample",),
        fractional_timesteps=True,
        sigma_space=True,
        stochastic=True,
        visits=sigma_visits,
        weights=ancestral_weights,
    )
)
