"""The smallest models with random weights, in the layouts of those that ship."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from megjax.codec import SeedCodec, SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm.fitting import prepare_tokenizer
from megjax.ldm.recipe import PRESETS, Recipe
from megjax.metrics import SceneNet
from megjax.system import SourceStatistics


def random_params(make: Callable[[], nnx.Module], rng: np.random.Generator) -> tuple[nnx.GraphDef, PyTree]:
    """Graph and parameters of `make()`: normal weights that keep the size of what they multiply, no biases.

    Drawn by NumPy: initialisers of Flax compile a program for each shape.
    """
    graph, abstract = nnx.split(nnx.eval_shape(make))

    def fill(path, leaf):
        if len(leaf.shape) < 2:
            scales = "scale" in jax.tree_util.keystr(path)
            return np.full(leaf.shape, float(scales), np.float32)
        return (rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return graph, jax.tree_util.tree_map_with_path(fill, abstract)


def write_model(folder: Path) -> Path:
    """A scenes model of 32x32 pixels and latents [4 4 4]; returns its folder."""
    recipe = dataclasses.replace(PRESETS["tiny"], image_size=32)  # 16x16 pixels are too few symbols for the link
    tokenizer = prepare_tokenizer(folder / "run")
    configs = Configs(
        recipe.text_config(len(tokenizer)), recipe.unet_config, recipe.vae_config, recipe.scheduler_config
    )
    rng = np.random.default_rng(0)
    parts = {
        "text_encoder": random_params(lambda: CLIPTextModel(configs.text_encoder, rngs=ShapeRngs()), rng),
        "unet": random_params(lambda: UNet2DConditionModel(configs.unet, rngs=ShapeRngs()), rng),
        "vae": random_params(lambda: AutoencoderKL(configs.vae, rngs=ShapeRngs()), rng),
    }
    graphs = Graphs(**{name: graph for name, (graph, _) in parts.items()}, scaling_factor=1.0)
    params = {name: state for name, (_, state) in parts.items()}
    pipe = StableDiffusion(configs, graphs, params, tokenizer)
    pipe.save_pretrained(folder / "model", dtype=np.float16, variant="fp16")
    scenenet = random_params(lambda: SceneNet(recipe.scenenet_config, ShapeRngs()), rng)
    nnx.merge(*scenenet).save(folder / "model" / "scenenet")
    SourceStatistics().save(folder / "model")
    return folder / "model"


def noise_picture(key, scene, size):
    """A picture of noise, to stand in for `scenes.render`, whose pictures take long to compile."""
    return jax.random.uniform(key, (size, size, 3))


def small_recipe(num_shards: int = 1) -> Recipe:
    """The tiny preset with fewer layers."""
    tiny = PRESETS["tiny"]
    return dataclasses.replace(tiny, vae_widths=(8, 8), unet=dataclasses.replace(tiny.unet, num_shards=num_shards))


def write_codec(folder: Path, **settings) -> Path:
    """An untrained codec of latents [4 4 4], with 20 of them for validation; returns its folder."""
    sizes = {"latent_shape": (4, 4, 4), "tile": (4, 4), "width": 8, "hidden": 8, "snr_steps": 3, "rate_steps": 2}
    config = SeedCodecConfig(**sizes | settings)
    latents = np.random.default_rng(0).normal(size=(500, 4, 4, 4)).astype(np.float32)
    SeedCodec(initial_network(config, latents), latents[:20]).save_pretrained(folder, np.float32)
    return folder
