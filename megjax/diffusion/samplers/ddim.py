"""DDIM: the first-order step of the probability flow, with a share of fresh noise if asked for."""

from megjax.diffusion.sampler_types import SAMPLERS, THRESHOLDING, SamplingMethod, Steps, Weights, first_order
from megjax.diffusion.samplers.levels import discrete_visits
from megjax.diffusion.scheduler_config import SchedulerConfig


def ddim_weights(config: SchedulerConfig, steps: Steps, eta: float) -> Weights:
    """Weights of J. Song et al., "Denoising diffusion implicit models", 2021, eq. 12, sigma_t being eta times eq. 16's.

    `eta` goes from 0, deterministic, to 1, ancestral.
    """
    if not eta:
        return first_order(config, steps, eta)
    xp, here, after = steps.xp, steps.here, steps.after
    # Both maxima only guard against rounding: a step that stands still, and eta = 1 from zero SNR.
    spread = eta * xp.sqrt((1 - after) / (1 - here) * xp.maximum(1 - here / after, 0))
    return Weights(xp.sqrt(after), xp.sqrt(xp.maximum(1 - after - spread**2, 0)), spread)


SAMPLERS.register(
    SamplingMethod(
        name="ddim",
        title="DDIM",
        version=1,
        rank=10,
        class_name="DDIMScheduler",
        settings={
            "set_alpha_to_one": None,
            "clip_sample": None,
            "clip_sample_range": None,
            "rescale_betas_zero_snr": None,
            **THRESHOLDING,
        },
        defaults={"timestep_spacing": "leading", "clip_sample": True},
        takes_eta=True,
        visits=discrete_visits,
        weights=ddim_weights,
    )
)
