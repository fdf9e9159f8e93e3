"""Train the bundled text-to-image model from nothing: tokenizer, VAE, SceneNet, text encoder and U-Net; then export it.

Every stage continues from its newest checkpoint under --folder, so the same command resumes after a kill.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from megjax.configs import read_json, require
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.vae import AutoencoderKL
from megjax.keys import from_seed
from megjax.ldm import fitting, stages
from megjax.ldm.grids import save_grid
from megjax.ldm.recipe import PRESETS, Recipe
from megjax.processes import is_first
from megjax.runtime import command, use_cpu_devices

GRID = 32


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train and where to keep it."""

    preset: Literal["scenes", "scenes128", "tiny"] = "scenes"
    """Sizes and step counts; `scenes` is what ships, `scenes128` wants a GPU."""
    stage: Literal["all", "vae", "scenenet", "unet"] = "all"
    """One stage (with those it needs), or all of them and the export."""
    shards: int | None = None
    """Parts of a batch of the U-Net, spread over the devices, instead of the preset's; each has draws of its own."""
    folder: Path | None = None
    """Run folder (default runs/PRESET): checkpoints, metrics.jsonl, TensorBoard and sample grids of each stage."""
    export: Path | None = None
    """Where the finished model goes in the diffusers layout (stage all); default FOLDER/model."""


def vae_grid(recipe: Recipe, graph: nnx.GraphDef, folder: Path):
    """A callback that saves held-out pictures above their reconstructions."""
    _, images = jax.jit(lambda k: stages.draw_scenes(k, GRID, recipe.image_size, "held_out"))(from_seed(7))

    @jax.jit
    def reconstruct(params):
        vae = nnx.merge(graph, params)
        return jnp.clip(0.5 * vae.decode(vae.encode(2 * images - 1)[0]) + 0.5, 0.0, 1.0)

    def save(state) -> None:
        if not is_first():
            return
        decoded = reconstruct(state.ema)
        half = GRID // 2
        rows = np.concatenate([images[:half], decoded[:half], images[half:], decoded[half:]])
        save_grid(rows, folder / "vae" / "grids" / f"{int(state.step):06d}.png", half)

    return save


def unet_grid(recipe: Recipe, folder: Path):
    """A callback that saves pictures generated from held-out captions, each next to a real one."""
    drawn, real = jax.jit(lambda k: stages.draw_scenes(k, GRID, recipe.image_size, "held_out"))(from_seed(7))
    captions = [row[0] for row in fitting.captions_of(drawn)]

    def save(pipe, step: int) -> None:
        if not is_first():
            return
        images = pipe.generate(from_seed(0), pipe.tokenize(captions))
        half = GRID // 2
        rows = np.concatenate([real[:half], images[:half], real[half:], images[half:]])
        save_grid(rows, folder / "unet" / "grids" / f"{step:06d}.png", half)

    return save


def make_recipe(args: Arguments) -> Recipe:
    """The preset with the arguments' changes; ValueError on bad ones."""
    recipe = PRESETS[args.preset]
    shards = recipe.unet.num_shards if args.shards is None else args.shards
    return dataclasses.replace(recipe, unet=dataclasses.replace(recipe.unet, num_shards=shards))


def main(args: Arguments) -> None:
    recipe, folder = make_recipe(args), args.folder or Path("runs") / args.preset
    require(args.export is None or args.stage == "all", "--export", str(args.export), "given with --stage all only")
    destination = args.export or folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage != "scenenet":
        graph = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(recipe.vae_config, rngs=ShapeRngs())))[0]
        vae = fitting.train_vae(recipe, folder, vae_grid(recipe, graph, folder))
    if args.stage in ("all", "scenenet"):
        scenenet = fitting.train_scenenet(recipe, folder)
    if args.stage in ("all", "unet"):
        pipe = fitting.train_unet(recipe, folder, vae, unet_grid(recipe, folder))
    if not is_first():
        return
    if args.stage == "all":
        fitting.export(recipe, folder, pipe, scenenet, destination)
        print(f"model written to {destination}")
    for stage in sorted(path.parent.name for path in folder.glob("*/seconds.json")):
        print(f"{stage}: {read_json(folder / stage / 'seconds.json')['seconds'] / 60:.1f} minutes of training")


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    use_cpu_devices(arguments.shards or PRESETS[arguments.preset].unet.num_shards)
    command("train.ldm", lambda: main(arguments), many=True)
