"""The smallest of diffusion models, with random weights, and a cache of latents that it made."""

import numpy as np
import pytest

from megjax.data import latents
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.tokenization import train_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL, VAEConfig
from tests import checks
from tests.models import random_params

LIMIT, SIZE, SHARD = 12, 8, 4
COLOURS = ("red", "green", "blue", "white", "black", "pink", "grey", "brown", "gold")
PROMPTS = [f"a {colour} house" for colour in COLOURS]
SETTINGS = {"seed": 3, "num_steps": 2, "guidance_scale": 3.0, "shard_size": SHARD}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The smallest of models, with random weights."""
    tokens = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(PROMPTS * 5, tokens, vocab_size=600, max_tokens=LIMIT)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
    )
    unet = UNetConfig(
        sample_size=SIZE,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
    scheduler = SchedulerConfig("ddim", beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    rng = np.random.default_rng(0)
    parts = {
        "text_encoder": random_params(lambda: CLIPTextModel(text, rngs=ShapeRngs()), rng),
        "unet": random_params(lambda: UNet2DConditionModel(unet, rngs=ShapeRngs()), rng),
        "vae": random_params(lambda: AutoencoderKL(vae, rngs=ShapeRngs()), rng),
    }
    graphs = Graphs(**{name: pair[0] for name, pair in parts.items()}, scaling_factor=vae.scaling_factor)
    params = {name: pair[1] for name, pair in parts.items()}
    return StableDiffusion(Configs(text, unet, vae, scheduler), graphs, params, tokenizer)


@pytest.fixture
def calls(model, monkeypatch):
    """The number of latents that each call of any model has made in this test."""
    made = []

    def count(function):
        def counted(self, *arguments, **options):
            results = function(self, *arguments, **options)
            made.append(len(results))
            return results

        return counted

    for name in ("generate_latents", "encode"):
        monkeypatch.setattr(StableDiffusion, name, count(getattr(StableDiffusion, name)))
    return made


@pytest.fixture(scope="session")
def cached(model, tmp_path_factory):
    """Folder of a cache of all prompts, three shards, and what `generate` returned; not to be changed."""
    folder = tmp_path_factory.mktemp("cache")
    with checks.fast_compile():
        return folder, latents.generate(model, PROMPTS, folder, **SETTINGS)


@pytest.fixture
def cache(cached, tmp_path):
    """A copy of that folder, to damage."""
    for path in cached[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path
