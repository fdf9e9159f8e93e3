"""How the cost of an image grows with batch, resolution and steps: the bundled model, and the U-Net of SD 1.5."""

import dataclasses

import jax
import jax.numpy as jnp

from eval.aot_jobs import model_configs
from eval.markdown import interval
from eval.measure import Contender, measure
from eval.stages import STAGES, Measured, Stage
from eval.stages.diffusion import UNetCall
from megjax.diffusion.pipeline import StableDiffusion

BATCHES, SIDES, STEPS = (1, 4, 16, 64), (64, 128, 192), (5, 10, 25, 50)
UNET_SIDES, UNET_BATCHES = (256, 384, 512), (2, 4)
COLUMNS = ["setting", "ms a call", "ms an image", "to the first", "first call (s)"]


def run(rounds: int, with_unet: bool = True) -> Measured:
    """Rows of the benchmark file, no missing peers, and notes; one thing varies in every case."""
    pipe, rows = StableDiffusion.from_pretrained("scenes"), []
    prompt = ["a red house under a night sky"]

    def image(batch=1, side=64, steps=25):
        ids, key = pipe.tokenize(prompt * batch), jax.random.key(0)
        size = {"height": side, "width": side, "num_steps": steps}
        return lambda: jax.block_until_ready(pipe.generate(key, ids, **size))

    cases = {
        "bundled model, 64x64, 25 guided steps, by batch": {f"batch {n}": (image(n), n) for n in BATCHES},
        "bundled model, one image, 25 guided steps, by size": {f"{n}x{n}": (image(1, n), 1) for n in SIDES},
        "bundled model, one image of 64x64, by guided steps": {f"{n} steps": (image(1, 64, n), 1) for n in STEPS},
    }
    for case, settings in cases.items():
        rows += timed(case, settings, rounds)
    if with_unet:
        on_cpu = jax.default_backend() == "cpu"
        configs, length = model_configs("sd15", jnp.float32 if on_cpu else jnp.bfloat16)
        by_side, by_batch = {}, {}
        for side in UNET_SIDES:
            small = dataclasses.replace(configs.unet, sample_size=side // configs.vae.downsample)
            by_side[f"{side}x{side}"] = (UNetCall(small, length, 2), 1)
        for batch in UNET_BATCHES:
            small = dataclasses.replace(configs.unet, sample_size=UNET_SIDES[0] // configs.vae.downsample)
            by_batch[f"batch {batch}"] = (UNetCall(small, length, batch), batch // 2)
        rows += timed("U-Net of sd15, one guided image, by size", by_side, rounds)
        rows += timed(f"U-Net of sd15, {UNET_SIDES[0]}x{UNET_SIDES[0]}, by batch", by_batch, rounds)
    return rows, [], ["A guided image is a batch of two for the U-Net."]


def timed(case: str, settings: dict, rounds: int) -> list[dict]:
    """Rows of one case: (call, images a call) by setting."""
    timings = measure([Contender(name, call) for name, (call, _) in settings.items()], rounds, case)
    rows = []
    for name, (_, images) in settings.items():
        rows.append(
            {
                "case": case,
                "batch": 0,
                "images": images,
                "implementation": name,
                "seconds": timings[name].median_s,
                "seconds_quartiles": list(timings[name].quartiles_s),
                "seconds_an_image": timings[name].median_s / images,
                "first_call_s": timings[name].first_s,
                "rounds": rounds,
            }
        )
        rows[-1]["to_the_first"] = rows[-1]["seconds_an_image"] / rows[0]["seconds_an_image"]
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_quartiles
    return [
        row.implementation,
        interval(1e3 * row.seconds, 1e3 * low, 1e3 * high, ",.4g"),
        f"{1e3 * row.seconds_an_image:,.4g}",
        f"{row.to_the_first:.2f}",
        f"{row.first_call_s:.1f}",
    ]


STAGES.register(
    Stage(
        name="scaling",
        title="cost over batch, size and steps",
        version=1,
        rank=90,
        run=lambda args, _: run(args.rounds, args.model != "scenes"),
        columns=COLUMNS,
        cells=cells,
    )
)
