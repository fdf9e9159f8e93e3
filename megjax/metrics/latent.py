"""Error of received latents."""

from typing import Any

import numpy as np
from jaxtyping import Float

from megjax.metrics.base import METRICS, Metric, References, mean_over_images


def _relative(name: str, values: Float[np.ndarray, "n r"], references: References) -> dict[str, Any]:
    return mean_over_images(name, values / references.total_variance, references)


METRICS.register(
    Metric(
        name="nmse",
        title="latent NMSE",
        version=1,
        rank=60,
        compute=lambda received: received.error,
        needs=("error",),
        reduce=_relative,
        form=".4f",
        log_scale=True,
        panel=False,
    )
)
