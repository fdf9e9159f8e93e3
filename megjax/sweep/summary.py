"""From the receptions of a point to its row: means, intervals over images, distances, pictures."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from megjax.metrics import bootstrap_interval, frechet_interval, kernel_distance
from megjax.sweep.bench import Bench

RESAMPLES = 25
"""Bootstrap resamples of a distance, whose spread alone is used."""


def summarise(found: dict[str, np.ndarray], bench: Bench) -> dict[str, Any]:
    """Means, 95 % intervals bootstrapped over images, distances, and the mean of every image."""
    row: dict[str, Any] = {"n": found["energy"].size, "images": len(found["energy"])}
    if "squared_error" in found:
        found = {**found, "nmse": found["squared_error"] / bench.total_variance}
    weights = None if bench.prompts.stated is None else bench.prompts.stated.sum(1).astype(float)
    for name in ("psnr_db", "ssim", "nmse", "caption_accuracy", "num_symbols", "energy"):
        if name not in found:
            continue
        values = found[name].astype(np.float64)
        mine = weights if name == "caption_accuracy" else None
        per_image = values.mean(1)
        low, high = bootstrap_interval(values, weights=mine)
        row |= {name: float(np.average(per_image, weights=mine)), f"{name}_low": low, f"{name}_high": high}
        if name not in ("num_symbols", "energy"):
            row[f"{name}_values"] = per_image.astype(np.float32).tolist()
    if "features" in found:
        row |= _distances(found["features"], bench.reference_features("scenenet"), "frechet", "kernel_distance")
    if "inception" in found:
        row |= _distances(found["inception"], bench.reference_features("inception"), "fid", "kid")
    if "pictures" in found:
        row["pictures"] = [encode_png(picture) for picture in found["pictures"][:, 0]]
        row["server_pictures"] = [encode_png(picture) for picture in bench.images[: len(row["pictures"])]]
        row["captions"] = bench.prompts.texts[: len(row["pictures"])]
    return row


def encode_png(picture: Float[np.ndarray, "H W 3"]) -> bytes:
    """A picture in [0, 1] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _distances(
    features: Float[np.ndarray, "n r f"], reference: Float[np.ndarray, "n f"], frechet: str, kernel: str
) -> dict[str, float]:
    """Frechet and kernel distances to the reference pictures, under these names."""
    flat = features.reshape(-1, features.shape[-1])
    interval = frechet_interval(features, reference, paired=True, num_resamples=RESAMPLES)
    row = {frechet: interval.distance, f"{frechet}_low": interval.low, f"{frechet}_high": interval.high}
    subset = min(500, len(reference) // 2)
    if subset < 2:
        return row
    distance, error = kernel_distance(flat, reference, num_subsets=20, subset_size=subset)
    return row | {kernel: distance, f"{kernel}_error": error}
