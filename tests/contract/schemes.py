"""Small sweeps of an untrained model with fixed keys for the stored outputs: every scheme, policy, and more fading."""

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from megjax.data import scenes
from megjax.metrics import METRICS
from megjax.power import POLICIES
from megjax.sweep import SweepConfig, bench, read_points, run_sweep
from megjax.system import SCHEMES
from tests.contract.stored import Part
from tests.models import write_codec, write_model
from tests.sweep.conftest import flat_picture

PICTURED = ("seed", *(scheme.name for scheme in SCHEMES if scheme.result == "images"))
"""Schemes whose pictures are compared, which takes most of the time; of the others, latents are."""
LATENTS_ONLY = tuple(name for name in SCHEMES.names if name not in PICTURED)
EQUAL_POWER = ("seed", "seed-klt", "opta")
"""Schemes that are also tried at equal power, where it makes a difference."""
SWEPT_POLICIES = tuple(name for name in POLICIES.names if name != "dp")
"""Policies of the seed; the dynamic program takes long for every point, and `parts.py` has its powers."""
FADINGS = ("rician:6", "gauss-markov:0.9")
MEASURED = ("psnr_db", "ssim", "frechet", "caption_accuracy", "kernel_distance", "nmse")
"""Metrics whose values are stored, so that another metric changes no outputs of schemes."""
BLOCK = 8
"""Pixels along a side of the squares whose means are stored of a picture."""


@functools.cache
def results(**settings) -> tuple[pd.DataFrame, list[dict]]:
    """Table and points of a sweep of these settings."""
    folder = models()
    config = SweepConfig(
        models=(str(folder / "model"),),
        codec=str(folder / "codec"),
        rates=(2.0,),
        snr_db=(5.0,),
        device_steps=(2,),
        num_images=4,
        num_training=100,
        realisations=2,
        steps=2,
        **settings,
    )
    # Pictures of scenes take long to compile, and to compress.
    with tempfile.TemporaryDirectory() as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", flat_picture)
        patch.setattr(bench, "IMAGE_CODEC_SCENES", 20)
        options = {"latents": folder / "latents", "batch": 8, "progress": False}
        return run_sweep(config, Path(output), **options), read_points(Path(output))


@functools.cache
def models() -> Path:
    """Folder of an untrained model and codec, removed when the process ends, and of the latents that sweeps share."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="megjax-stored-"))
    folder = Path(_FOLDERS[-1].name)
    write_model(folder)
    write_codec(folder / "codec")
    write_codec(folder / "denoiser", transform="raw", encoder_blocks=0)
    return folder


_FOLDERS: list[tempfile.TemporaryDirectory] = []


def columns(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns of numbers that these rows have, without metrics that are not stored."""
    others = [metric.name + end for metric in METRICS if metric.name not in MEASURED for end in ("", "_low", "_high")]
    numbers = rows.drop(columns=others, errors="ignore").select_dtypes("number").dropna(axis="columns", how="all")
    return {name: values.to_numpy() for name, values in numbers.items()}


def block_means(png: bytes) -> np.ndarray:
    """Means [h w 3] over squares of a picture, as numbers from 0 to 1."""
    picture = np.asarray(Image.open(io.BytesIO(png)), np.float64) / 255
    height, width = (size // BLOCK for size in picture.shape[:2])
    return picture.reshape(height, BLOCK, width, BLOCK, 3).mean((1, 3)).astype(np.float32)


def asked(name: str) -> str:
    """The scheme with what it needs."""
    return f"{name}:folder={models() / 'denoiser'}" if name == "latent-denoiser" else name


def scheme_rows(name: str) -> dict[str, np.ndarray]:
    """A scheme's row at equal energy, with its first picture where pictures are compared, and at equal power."""
    found = {}
    if name in PICTURED:
        frame, points = results(schemes=PICTURED, modes=("equal_energy",))
        (point,) = [row for row in points if row["scheme"] == name]
        found = columns(frame[frame.scheme == name]) | {"picture": block_means(point["pictures"][0])}
    else:
        frame, _ = results(schemes=tuple(map(asked, LATENTS_ONLY)), modes=("equal_energy",), metrics="latent")
        found = columns(frame[frame.scheme == asked(name)])
    if name in EQUAL_POWER:
        frame, _ = results(schemes=EQUAL_POWER, modes=("equal_power",), metrics="latent")
        power = columns(frame[frame.scheme == name])
        found |= {f"equal_power.{column}": values for column, values in power.items()}
    return found


def policy_rows(policy: str) -> dict[str, np.ndarray]:
    """The row of the seed under a policy."""
    frame, _ = results(schemes=("seed",), policies=SWEPT_POLICIES, modes=("equal_power",), metrics="latent")
    return columns(frame[frame.policy == policy])


def fading_rows(fading: str) -> dict[str, np.ndarray]:
    """The row of the seed under a law of fading."""
    frame, _ = results(schemes=("seed",), fadings=FADINGS, modes=("equal_power",), metrics="latent")
    return columns(frame[frame.fading == fading])


PARTS = (
    *(
        Part("scheme", scheme.name, functools.partial(scheme_rows, scheme.name), True, str(scheme.version))
        for scheme in SCHEMES
        if scheme.version is not None
    ),
    *(Part("scheme", f"seed-{name}", functools.partial(policy_rows, name), slow=True) for name in SWEPT_POLICIES),
    *(Part("scheme", f"seed-{name}", functools.partial(fading_rows, name), slow=True) for name in FADINGS),
)
