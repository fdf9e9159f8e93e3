"""Tests of the bundled model's training: every stage end to end at tiny size, resumed, exported and opened."""

import jax
import numpy as np
import pytest

from megjax.configs import read_json
from megjax.data import scenes
from megjax.diffusion.pipeline import StableDiffusion
from megjax.files import read_safetensors
from megjax.ldm import fitting
from megjax.ldm.quality import measure
from megjax.ldm.recipe import MAX_TOKENS, PRESETS
from megjax.metrics import SceneNet
from megjax.system import SourceStatistics
from tests import models
from tests.checks import metric_rows
from train.ldm import Arguments, main

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


@pytest.fixture(scope="module")
def recipe(module_unchecked, fast_compile):
    """The tiny preset with fewer layers, under its name, and pictures that cost nothing."""
    smaller = models.small_recipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", smaller)
        patch.setattr(scenes, "render", models.noise_picture)
        yield smaller


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """Run folder with all stages finished."""
    folder = tmp_path_factory.mktemp("ldm")
    main(Arguments(preset="tiny", folder=folder))
    return folder


def test_every_stage_logs_checkpoints_and_grids(trained):
    for stage in ("vae", "scenenet", "unet"):
        rows = metric_rows(trained / stage)
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(np.isfinite(row["loss"]) for row in rows)
        assert (trained / stage / "checkpoints" / "6").is_dir()
    assert list((trained / "vae" / "grids").glob("*.png")) and list((trained / "unet" / "grids").glob("*.png"))


def test_the_same_command_again_changes_nothing(trained):
    files = list((trained / "model").rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in files}
    main(Arguments(preset="tiny", folder=trained))
    assert len(before) == 4
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_export_opens_and_measures(trained):
    pipe = StableDiffusion.from_pretrained(trained / "model")
    scenenet = SceneNet.load(trained / "model" / "scenenet")
    figures = measure(pipe, scenenet, 4, batch=2, num_steps=2)
    assert 0 <= figures["generated_accuracy"]["mean"] <= 1
    assert figures["vae_psnr_db"]["n"] == 4
    assert len(figures["by_attribute"]) == len(scenes.ATTRIBUTES)
    with pytest.raises(ValueError, match="num is 5"):
        measure(pipe, scenenet, 5, batch=2)


def test_latents_have_unit_variance_under_the_stored_constants(trained):
    factor = read_json(trained / "model" / "vae" / "config.json")["scaling_factor"]
    data = read_safetensors(trained / fitting.LATENTS)
    noise = np.random.default_rng(0).standard_normal(data["mean"].shape)
    samples = factor * (data["mean"] + np.exp(0.5 * data["log_variance"]) * noise)
    statistics = SourceStatistics.load(trained / "model")
    whitened = (samples - np.array(statistics.latent_mean)) / np.array(statistics.latent_std)
    per_image = np.square(whitened).mean((1, 2, 3))
    assert abs(per_image.mean() - 1) < 4 * per_image.std() / np.sqrt(len(per_image))
    assert abs(samples.std() - 1) < 4 * per_image.std() / np.sqrt(len(per_image))


def test_latents_of_another_autoencoder_are_refused(trained, recipe):
    vae = fitting.train_vae(recipe, trained)
    tokenizer = fitting.prepare_tokenizer(trained)
    fitting.encode_scenes(recipe, trained, vae, tokenizer)
    other = vae[0], jax.tree.map(lambda x: x + 1, vae[1])
    with pytest.raises(ValueError, match=r"made with another is \['vae'\]"):
        fitting.encode_scenes(recipe, trained, other, tokenizer)


def test_captions_fit_the_tokenizer_as_one_token_a_word(trained):
    tokenizer = fitting.prepare_tokenizer(trained)
    drawn = jax.jit(jax.vmap(lambda k: scenes.sample_scene(k, "held_out")))(jax.random.split(jax.random.key(3), 300))
    lengths = [len(tokenizer(caption)["input_ids"]) for row in fitting.captions_of(drawn) for caption in row]
    assert max(lengths) <= MAX_TOKENS
    assert len(tokenizer("a large purple balloon")["input_ids"]) == 4 + 2
