"""From the receptions of a point to its row: the columns of its metrics, and pictures."""

import io
import json
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from megjax.metrics import METRICS, mean_over_images
from megjax.sweep.bench import Bench
from megjax.sweep.store import VERSIONS


def summarise(found: dict[str, np.ndarray], bench: Bench) -> dict[str, Any]:
    """Means, 95 % intervals bootstrapped over images, distances, and the mean of every image."""
    row: dict[str, Any] = {"n": found["energy"].size, "images": len(found["energy"])}
    for name in ("num_symbols", "energy"):
        columns = mean_over_images(name, found[name], bench)
        row |= {column: value for column, value in columns.items() if column != f"{name}_values"}
    for metric in METRICS:
        if metric.collected in found:
            row |= metric.reduce(metric.name, found[metric.collected], bench)
    measured = (metric.name for metric in METRICS if metric.collected in found)
    row[VERSIONS] = json.dumps({name: METRICS.version_of(name) for name in measured})
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
