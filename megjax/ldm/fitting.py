"""The stages of training the bundled model; each continues from its own checkpoints under one run folder."""

import dataclasses
from pathlib import Path

from flax import nnx

from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm import stages
from megjax.ldm.recipe import Recipe
from megjax.metrics.scenenet import SceneNet
from megjax.training import fit


def train_vae(recipe: Recipe, folder: Path) -> tuple[nnx.GraphDef, nnx.State]:
    """Train the autoencoder; returns its graph and averaged parameters."""
    model = AutoencoderKL(recipe.vae_config, rngs=nnx.Rngs(recipe.vae.fit.seed))
    graph, params = nnx.split(model)
    loss_fn = stages.vae_loss(graph, recipe.vae.batch, recipe.image_size)
    description = {"image_size": recipe.image_size, "widths": recipe.vae_widths, "batch": recipe.vae.batch}
    return graph, fit(loss_fn, params, (), recipe.vae.fit, folder / "vae", description=description).ema


def train_scenenet(recipe: Recipe, folder: Path) -> tuple[nnx.GraphDef, nnx.State]:
    """Train the attribute classifier; returns its graph and averaged parameters."""
    graph, params = nnx.split(SceneNet(recipe.scenenet_config, nnx.Rngs(recipe.scenenet.fit.seed)))
    loss_fn = stages.scenenet_loss(graph, recipe.scenenet.batch, recipe.image_size)
    description = {**dataclasses.asdict(recipe.scenenet_config), "batch": recipe.scenenet.batch}
    return graph, fit(loss_fn, params, (), recipe.scenenet.fit, folder / "scenenet", description=description).ema
