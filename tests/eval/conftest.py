"""A tiny scenes model with random weights, in the shipped layout."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from eval import benchmark
from eval.measure import ceilings
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm.fitting import prepare_tokenizer
from megjax.ldm.recipe import PRESETS
from megjax.metrics import SceneNet
from megjax.system import SourceStatistics


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """Benchmarks measure the device's ceilings first, at sizes that take minutes on a slow one."""
    monkeypatch.setattr(benchmark, "ceilings", lambda: ceilings(3, 64, 2**16))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the model."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = dataclasses.replace(PRESETS["tiny"], image_size=32)  # 16x16 pixels are too few symbols for the link
    tokenizer = prepare_tokenizer(folder / "run")
    configs = Configs(
        recipe.text_config(len(tokenizer)), recipe.unet_config, recipe.vae_config, recipe.scheduler_config
    )
    rngs = nnx.Rngs(0)
    parts = {
        "text_encoder": nnx.split(CLIPTextModel(configs.text_encoder, rngs=rngs)),
        "unet": nnx.split(UNet2DConditionModel(configs.unet, rngs=rngs)),
        "vae": nnx.split(AutoencoderKL(configs.vae, rngs=rngs)),
    }
    graphs = Graphs(**{name: graph for name, (graph, _) in parts.items()}, scaling_factor=1.0)
    params = {name: jax.tree.map(np.asarray, state) for name, (_, state) in parts.items()}
    pipe = StableDiffusion(configs, graphs, params, tokenizer)
    pipe.save_pretrained(folder / "model", dtype=np.float16, variant="fp16")
    SceneNet(recipe.scenenet_config, rngs).save(folder / "model" / "scenenet")
    SourceStatistics().save(folder / "model")
    return folder / "model"
