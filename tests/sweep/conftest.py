"""The tiny scenes model with an untrained codec, and sweeps of it that take seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from megjax.data import scenes
from megjax.diffusion.pipeline import StableDiffusion
from megjax.metrics import SceneNet
from megjax.sweep import SweepConfig, bench, run_sweep

ABOUT = {"commit": "0123456789ab", "device": "a processor"}


def flat_picture(key, scene, size):
    """A picture of one colour, for `scenes.render`, whose pictures take long to compile."""
    return jnp.broadcast_to(jax.random.uniform(key, (3,)), (size, size, 3))


@pytest.fixture(scope="session")
def made_once():
    """What every sweep makes anew serves all of them: models with their programs, classifiers and captions."""
    makers = ((StableDiffusion, "from_pretrained"), (SceneNet, "load"), (bench, "scene_captions"))
    return [(owner, name, functools.cache(getattr(owner, name))) for owner, name in makers]


@pytest.fixture(scope="module", autouse=True)
def quick_sweeps(made_once, fast_compile):
    """Tiny models compile longer than they run, and so do their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, maker in made_once:
            patch.setattr(owner, name, maker)
        patch.setattr(bench, "IMAGE_CODEC_SCENES", 20)
        patch.setattr(scenes, "render", flat_picture)
        yield


@pytest.fixture(scope="session")
def config(tiny_model, tiny_codec):
    """Four points, latents only."""
    return SweepConfig(
        schemes=("seed", "latent"),
        snr_db=(0.0, 10.0),
        modes=("equal_energy",),
        models=(str(tiny_model),),
        codec=str(tiny_codec),
        metrics="latent",
        num_images=6,
        realisations=2,
        num_blocks=4,
        steps=1,
        guidance=1.0,
    )


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Folder that all sweeps share."""
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="session")
def sweep(config, latents):
    """Run the small sweep with these changes in a folder."""

    def run(folder, *, batch=4, on_point=None, **changes):
        changed = dataclasses.replace(config, **changes)
        options = {"latents": latents, "batch": batch, "about": ABOUT, "progress": False, "on_point": on_point}
        return run_sweep(changed, folder, **options)

    return run


@pytest.fixture(scope="module")
def result(sweep, tmp_path_factory):
    """Table and folder of the small sweep."""
    folder = tmp_path_factory.mktemp("result")
    return sweep(folder), folder
