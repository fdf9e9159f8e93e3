"""Tests of the model that ships: its size, its agreement with diffusers, and that it draws what it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.codec import SeedCodec
from megjax.diffusion.generation import image_keys
from megjax.diffusion.layout import ASSETS
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from megjax.ldm.quality import measure
from megjax.metrics import SceneNet

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")
FOLDER = ASSETS / "scenes"
MEGABYTE = 2**20
PROMPTS = [
    "a red house, large, in the centre, a meadow under a clear daytime sky",
    "a red house, large, in the centre, a meadow under a clear night sky",
    "a small yellow boat on the left, by the sea",
    "two green trees under a clear sky",
]
SEED, STEPS = 0, 10


@pytest.fixture(scope="module")
def pipe(module_unchecked, fast_compile):
    return StableDiffusion.from_pretrained("scenes")


def test_it_is_small_and_in_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.parent.name not in ("codec", "power")]
    assert sum(path.stat().st_size for path in files) <= 20 * MEGABYTE
    weights = {path.relative_to(FOLDER).as_posix() for path in files if path.suffix == ".safetensors"}
    assert weights == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "scenenet/model.safetensors",
    }


def test_its_codec_is_small_keeps_the_power_and_beats_the_raw_latent():
    codec = SeedCodec.from_pretrained("scenes")
    assert sum(path.stat().st_size for path in (FOLDER / "codec").iterdir()) <= 6e6
    latents, snr_db = codec.validation, 0.0
    for rate in (4.0, 8.0):
        num_symbols = codec.num_symbols(rate)
        symbols, load = codec.encode(latents, num_symbols, snr_db)
        power = np.square(np.abs(np.asarray(symbols))).mean(2)
        # These latents were not trained on: unit power within the error of their mean.
        assert np.all(np.abs(power.mean(0) - 1) < 5 * power.std(0) / np.sqrt(len(latents)))
        assert np.mean(load) == pytest.approx(1.0, abs=1e-5)
    # AWGN at power P = 8, the energy of the raw latent: y = sqrt(P load) s + n, equalised.
    symbols, load = codec.encode(latents, num_symbols, 10 * np.log10(8.0))
    snr = 8 * np.broadcast_to(load, symbols.shape[:2])
    real, imaginary = np.asarray(jax.random.normal(jax.random.key(0), (2, *symbols.shape))) / np.sqrt(2)
    received = snr[..., None] * np.asarray(symbols) + np.sqrt(snr)[..., None] * (real + 1j * imaginary)
    equalised = (received / (1 + snr[..., None])).astype(np.complex64)
    decoded = codec.decode(equalised, snr, num_symbols, 10 * np.log10(8.0))
    total = np.var(latents, axis=0).sum()
    nmse = np.square(np.asarray(decoded) - latents).sum((1, 2, 3)).mean() / total
    assert nmse < 0.5  # the raw latent's, received symbol by symbol at 0 dB


@pytest.mark.parametrize("name", SAMPLERS.names)
def test_every_sampler_has_a_schedule_for_it(pipe, name):
    assert pipe.sampler(name, 25).num_steps >= 25


@pytest.fixture(scope="module")
def images(pipe):
    """What the model draws for PROMPTS with SEED."""
    return np.asarray(pipe.generate(jax.random.key(SEED), pipe.tokenize(PROMPTS), num_steps=STEPS))


@pytest.mark.slow
def test_diffusers_opens_it_and_draws_the_same_images(images):
    import diffusers
    import torch

    reference = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER), variant="fp16").to(torch.float32)
    reference.set_progress_bar_config(disable=True)
    keys, _ = image_keys(jax.random.key(SEED), len(PROMPTS))
    noise = np.stack([jax.random.normal(key, (8, 8, 4)) for key in keys])
    expected = reference(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    assert expected.std() > 0.1
    # The bound of every sampler's parity test; guided steps amplify float32 rounding.
    assert np.abs(images - expected).max() <= 2e-3


@pytest.mark.slow
def test_another_prompt_is_another_image(images):
    day, night = images[:2]
    assert day[:20].mean() > 2 * night[:20].mean()  # the sky


@pytest.mark.slow
def test_images_in_bfloat16_are_those_in_float32(images):
    half = StableDiffusion.from_pretrained("scenes", dtype=jnp.bfloat16)
    other = np.asarray(half.generate(jax.random.key(SEED), half.tokenize(PROMPTS), num_steps=STEPS))
    assert (-10 * np.log10(np.square(images - other, dtype=np.float64).mean((1, 2, 3)))).min() > 35
    assert not np.array_equal(images, other)


@pytest.mark.slow
def test_quality_on_held_out_captions(pipe):
    """What `python -m eval.quality` must find on 2,000 captions; here the upper ends of intervals over a few."""
    figures = measure(pipe, SceneNet.load(FOLDER / "scenenet"), 24, batch=len(PROMPTS), num_steps=STEPS)
    assert figures["vae_psnr_db"]["mean"] >= 28
    assert figures["real_accuracy"]["high"] >= 0.98
    assert figures["generated_accuracy"]["high"] >= 0.90
