"""Train the seed codec of a model through random fading links; generates and caches the latents it needs.

Latents and training continue where they were, so the same command resumes after a kill.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from megjax.codec import SeedCodec
from megjax.codec.link import symbols_at_rate
from megjax.codec.recipe import PRESETS, CodecRecipe, denoiser, specialist, train_codec
from megjax.configs import read_json, require
from megjax.data import latents
from megjax.diffusion import generation
from megjax.diffusion.pipeline import StableDiffusion
from megjax.ldm.stages import draw_scenes
from megjax.processes import is_first
from megjax.runtime import command


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train and where to keep it."""

    preset: Literal["scenes", "tiny"] = "scenes"
    """Sizes and step counts; `scenes` is what ships."""
    model: str = "scenes"
    """"scenes" (bundled), a folder in the diffusers layout, or a hub id."""
    prompts: Path | None = None
    """File of prompts, one a line, whose images' latents are learned from; default: captions of random scenes."""
    variant: Literal["seed", "denoiser"] = "seed"
    """The codec, or a learned receiver of the same size for the raw latent."""
    snr_db: float | None = None
    """With --rate: a specialist for this one effective SNR."""
    rate: float | None = None
    """With --snr-db: the specialist's compression ratio."""
    start: Path | None = None
    """A trained codec to go on from."""
    folder: Path | None = None
    """Run folder (default runs/codec-PRESET): latents, checkpoints, metrics.jsonl, TensorBoard."""
    export: Path | None = None
    """Where the finished codec goes; default FOLDER/VARIANT/model."""
    steps: int | None = None
    """Number of training steps instead of the preset's."""
    shards: int | None = None
    """Draws of the loss a step, spread over the devices, instead of the preset's 1: a step then does more."""
    image_weight: float = 0.0
    """Weight in [0, 1] of the decoded image's error in the loss; the rest is the latent's."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank; ValueError if there are none."""
    require(path.is_file(), "--prompts", str(path), "an existing text file")
    lines = [line.strip() for line in path.read_text().splitlines()]
    prompts = [line for line in lines if line]
    require(bool(prompts), "--prompts", str(path), "a file with at least one line that is not blank")
    return prompts


def gather(args: Arguments, recipe: CodecRecipe, pipe: StableDiffusion, folder: Path):
    """Latents from the caches of the run folder: generated, encoded (of scenes only, else None), for validation."""

    def generated(name: str, num: int, seed: int):
        if args.prompts is None:
            prompts, guidance = latents.scene_captions(num, seed), 3.0
        else:
            given = read_prompts(args.prompts)
            prompts, guidance = [given[i % len(given)] for i in range(num)], 7.5
        return latents.generate(pipe, prompts, folder / name, seed=seed, guidance_scale=guidance)

    train, validation = (
        generated("generated", recipe.num_generated, 0),
        generated("validation", recipe.num_validation, 2),
    )
    if args.prompts is not None or recipe.num_encoded == 0:
        return train, None, validation
    size = pipe.image_size[0]

    def draw(key, batch):
        return draw_scenes(key, batch, size)[1]

    source = f"scenes {size} train"
    return train, latents.encode(pipe, draw, recipe.num_encoded, folder / "encoded", source=source), validation


def make_recipe(args: Arguments, pipe: StableDiffusion) -> CodecRecipe:
    """The preset, fitted to the model's latents and the arguments."""
    recipe = PRESETS[args.preset]
    shape = pipe.latent_shape()
    tile = tuple(size if size <= 8 else 8 for size in shape[:2])
    codec = dataclasses.replace(recipe.codec, latent_shape=shape, tile=tile)
    steps = recipe.fit.num_steps if args.steps is None else args.steps
    conditions = dataclasses.replace(recipe.conditions, image_weight=args.image_weight)
    shards = recipe.num_shards if args.shards is None else args.shards
    fit = dataclasses.replace(recipe.fit, num_steps=steps)
    recipe = dataclasses.replace(recipe, codec=codec, conditions=conditions, fit=fit, num_shards=shards)
    if args.variant == "denoiser":
        recipe = denoiser(recipe)
    single = args.snr_db is not None
    require(single == (args.rate is not None), "--snr-db and --rate", (args.snr_db, args.rate), "given together")
    if single:
        recipe = specialist(recipe, args.snr_db, symbols_at_rate(args.rate, recipe.codec.num_values))
    return recipe


def main(args: Arguments) -> None:
    pipe = StableDiffusion.from_pretrained(args.model)
    recipe = make_recipe(args, pipe)
    start = None if args.start is None else SeedCodec.from_pretrained(args.start)
    folder = args.folder or Path("runs") / f"codec-{args.preset}"
    name = args.variant if args.rate is None else f"{args.variant}-r{args.rate:g}-{args.snr_db:g}dB"
    generated, encoded, validation = gather(args, recipe, pipe, folder)
    decode_images = None
    if args.image_weight > 0:

        def decode_images(z):
            return generation.decode(pipe.graphs, pipe.params, z)

    codec = train_codec(
        recipe, generated, encoded, folder / name, validation=validation, start=start, decode_images=decode_images
    )
    if not is_first():
        return
    destination = args.export or folder / name / "model"
    codec.save_pretrained(destination)
    minutes = read_json(folder / name / "seconds.json")["seconds"] / 60
    print(f"codec written to {destination} after {minutes:.1f} minutes of training")


if __name__ == "__main__":
    command("train.codec", lambda: main(tyro.cli(Arguments, description=__doc__)), many=True)
