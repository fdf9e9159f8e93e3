"""Distances between the received images of a sweep and pictures of the same captions, as sets of features."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from megjax.metrics.base import METRICS, Metric, Received, References
from megjax.metrics.frechet import frechet_interval
from megjax.metrics.kid import kernel_distance

RESAMPLES = 25
"""Bootstrap resamples of a distance, whose spread alone is used."""
SUBSETS, SUBSET_SIZE = 20, 500
"""Random subsets of a kernel distance, and images in each where there are enough."""


def _features(network: str):
    """Features [b r f] of the received images by one of SceneNet and Inception."""

    def compute(received: Received) -> Float[Array, "b r f"]:
        output = received.output(network)
        features = output[0] if isinstance(output, tuple) else output
        return features.reshape(*received.size, -1)

    return compute


def _frechet(network: str):
    def reduce(name: str, values: Float[np.ndarray, "n r f"], references: References) -> dict[str, Any]:
        reference = references.reference_features(network)
        found = frechet_interval(values, reference, paired=True, num_resamples=RESAMPLES)
        return {name: found.distance, f"{name}_low": found.low, f"{name}_high": found.high}

    return reduce


def _kernel(network: str):
    def reduce(name: str, values: Float[np.ndarray, "n r f"], references: References) -> dict[str, Any]:
        reference = references.reference_features(network)
        subset = min(SUBSET_SIZE, len(reference) // 2)
        if subset < 2:
            return {}
        flat = values.reshape(-1, values.shape[-1])
        distance, error = kernel_distance(flat, reference, num_subsets=SUBSETS, subset_size=subset)
        return {name: distance, f"{name}_error": error}

    return reduce


for _network, _names, _titles in (
    ("scenenet", ("frechet", "kernel_distance"), ("SceneNet Frechet distance", "SceneNet kernel distance")),
    ("inception", ("fid", "kid"), ("FID", "KID")),
):
    for _name, _title, _reduce in zip(_names, _titles, (_frechet, _kernel), strict=True):
        METRICS.register(
            Metric(
                name=_name,
                title=_title,
                version=1,
                rank=30 if _reduce is _frechet else 50,
                compute=_features(_network),
                collects=f"{_network} features",
                needs=("images", _network),
                reduce=_reduce(_network),
                form=".1f" if _reduce is _frechet else ".3g",
                log_scale=_reduce is _frechet,
                panel=_reduce is _frechet,
            )
        )
