"""The tiny scenes model with an untrained codec, and sweeps of it that take seconds."""

import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest

from megjax.codec import SeedCodec, SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.sweep import SweepConfig, run_sweep
from tests.eval.conftest import tiny_model  # noqa: F401 (a fixture)

ABOUT = {"commit": "0123456789ab", "device": "a processor"}


@pytest.fixture(scope="package", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package")
def tiny_codec(tmp_path_factory):
    """Folder of a codec of latents [4 4 4]."""
    folder = tmp_path_factory.mktemp("codec")
    config = SeedCodecConfig(latent_shape=(4, 4, 4), tile=(4, 4), width=8, hidden=8, snr_steps=3, rate_steps=2)
    latents = np.random.default_rng(0).normal(size=(500, 4, 4, 4)).astype(np.float32)
    SeedCodec(initial_network(config, latents), latents[:20]).save_pretrained(folder, np.float32)
    return folder


@pytest.fixture(scope="package")
def config(tiny_model, tiny_codec):  # noqa: F811
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


@pytest.fixture(scope="package")
def latents(tmp_path_factory):
    """Folder that all sweeps share."""
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="package")
def sweep(config, latents):
    """Run the small sweep with these changes in a folder."""

    def run(folder, *, batch=4, on_point=None, **changes):
        changed = dataclasses.replace(config, **changes)
        options = {"latents": latents, "batch": batch, "about": ABOUT, "progress": False, "on_point": on_point}
        return run_sweep(changed, folder, **options)

    return run


@pytest.fixture(scope="package")
def result(sweep, tmp_path_factory):
    """Table and folder of the small sweep."""
    folder = tmp_path_factory.mktemp("result")
    return sweep(folder), folder


@pytest.fixture
def unchecked():
    """Without the run-time check of annotations, which users do not have and which would hide the project's errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
