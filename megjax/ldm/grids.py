"""Picture grids that show how training goes."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image


def save_grid(images: Float[np.ndarray, "n h w 3"], path: Path, columns: int, scale: int = 2) -> None:
    """Tile images in [0, 1] in rows of `columns`, magnified `scale` times without smoothing, into a PNG."""
    images = np.asarray(images)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + 1), columns * (width + 1), 3))
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    pixels = np.clip(np.round(255 * sheet), 0, 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
