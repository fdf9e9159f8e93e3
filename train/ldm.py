"""Train the bundled text-to-image model from nothing: tokenizer, VAE, SceneNet, text encoder and U-Net; then export it.

Every stage continues from its newest checkpoint under --folder, so the same command resumes after a kill.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from flax import nnx

from megjax.configs import write_json
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm import fitting, stages
from megjax.ldm.grids import save_grid
from megjax.ldm.recipe import PRESETS, Recipe
from megjax.runtime import enable_compilation_cache, use_cpu_devices

GRID = 32


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train and where to keep it."""

    preset: Literal["scenes", "scenes128", "tiny"] = "scenes"
    """Sizes and step counts; `scenes` is what ships, `scenes128` wants a GPU."""
    stage: Literal["all", "vae", "scenenet", "unet"] = "all"
    """One stage (with those it needs), or all of them and the export."""
    folder: Path = Path("runs/scenes")
    """Run folder: checkpoints, metrics.jsonl, TensorBoard and sample grids of each stage."""
    export: Path | None = None
    """Where the finished model goes in the diffusers layout (stage all); default FOLDER/model."""


def vae_grid(recipe: Recipe, graph: nnx.GraphDef, folder: Path):
    """A callback that saves held-out pictures above their reconstructions."""
    _, images = jax.jit(lambda k: stages.draw_scenes(k, GRID, recipe.image_size, "held_out"))(jax.random.key(7))

    def save(state) -> None:
        vae = nnx.merge(graph, state.ema)
        decoded = np.clip(0.5 * np.asarray(vae.decode(vae.encode(2 * images - 1)[0])) + 0.5, 0, 1)
        half = GRID // 2
        rows = np.concatenate([images[:half], decoded[:half], images[half:], decoded[half:]])
        save_grid(rows, folder / "vae" / "grids" / f"{int(state.step):06d}.png", half)

    return save


def unet_grid(recipe: Recipe, folder: Path):
    """A callback that saves pictures generated from held-out captions, each next to a real one."""
    drawn, real = jax.jit(lambda k: stages.draw_scenes(k, GRID, recipe.image_size, "held_out"))(jax.random.key(7))
    captions = [row[0] for row in fitting.captions_of(drawn)]

    def save(pipe) -> None:
        images = pipe.generate(jax.random.key(0), pipe.tokenize(captions))
        half = GRID // 2
        rows = np.concatenate([real[:half], images[:half], real[half:], images[half:]])
        save_grid(rows, folder / "unet" / "grids" / f"{time.strftime('%H%M%S')}.png", half)

    return save


def main(args: Arguments) -> None:
    recipe = PRESETS[args.preset]
    times = args.folder / "seconds.json"
    seconds = json.loads(times.read_text()) if times.is_file() else {}

    def timed(name: str, run):
        started = time.monotonic()
        result = run()
        seconds.setdefault(name, []).append(round(time.monotonic() - started, 1))
        write_json(times, seconds)
        return result

    args.folder.mkdir(parents=True, exist_ok=True)
    if args.stage != "scenenet":
        graph = nnx.split(nnx.eval_shape(lambda: AutoencoderKL(recipe.vae_config, rngs=ShapeRngs())))[0]
        vae = timed("vae", lambda: fitting.train_vae(recipe, args.folder, vae_grid(recipe, graph, args.folder)))
    if args.stage in ("all", "scenenet"):
        scenenet = timed("scenenet", lambda: fitting.train_scenenet(recipe, args.folder))
    if args.stage in ("all", "unet"):
        pipe = timed("unet", lambda: fitting.train_unet(recipe, args.folder, vae, unet_grid(recipe, args.folder)))
    if args.stage == "all":
        destination = args.export or args.folder / "model"
        fitting.export(recipe, args.folder, pipe, scenenet, destination)
        print(f"model written to {destination}; seconds per stage and sitting: {seconds}")


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    use_cpu_devices(PRESETS[arguments.preset].unet.num_shards)
    enable_compilation_cache()
    try:
        main(arguments)
    except ValueError as error:
        sys.exit(f"train.ldm: {error}")
