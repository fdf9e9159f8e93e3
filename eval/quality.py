"""Measure a scenes model on held-out captions: VAE PSNR, caption accuracy and Frechet distance, with intervals."""

import dataclasses
from pathlib import Path

import jax
import tyro

from megjax.configs import require, write_json
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from megjax.ldm.quality import measure
from megjax.metrics import SceneNet
from megjax.runtime import check_seed, command

UNITS = {"vae_psnr_db": ("dB", 1.0), "scenenet_frechet_distance": ("", 1.0)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.quality`: the model, its sampling, and the file of the figures."""

    model: str = "scenes"
    """"scenes" (bundled) or a folder written by train.ldm."""
    num: int = 2000
    """Held-out captions; a multiple of 50."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Share of the steps with guidance, from and to; the others take half the work."""
    sampler: str | None = None
    """Default: the model's own."""
    seed: int = 0
    """Seed of scenes and images."""
    output: Path = Path("outputs/quality.json")
    """JSON file for the figures."""


def run(args: Arguments) -> None:
    folder = locate(args.model)
    require((folder / "scenenet").is_dir(), "--model", args.model, "a model with a scenenet folder")
    require(not args.output.is_dir(), "--output", str(args.output), "a file")
    check_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pipe, scenenet = StableDiffusion.from_pretrained(folder), SceneNet.load(folder / "scenenet")
    options = {
        "num_steps": args.steps,
        "guidance_scale": args.guidance,
        "guidance_interval": args.guidance_interval,
        "sampler": args.sampler,
        "seed": args.seed,
    }
    figures = measure(pipe, scenenet, args.num, **options)
    device = jax.devices()[0].device_kind
    write_json(args.output, {**figures, "settings": options, "device": device, "jax": jax.__version__})
    for name, value in figures.items():
        if name == "by_attribute":
            print("generated, by attribute: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in value.items()))
            continue
        unit, scale = UNITS.get(name, ("%", 100.0))
        spread = f" [{scale * value['low']:.2f}, {scale * value['high']:.2f}]" if "low" in value else ""
        print(f"{name:26s} {scale * value['mean']:8.2f} {unit}{spread}  n = {value['n']}")
    print(f"written to {args.output}")


def main() -> None:
    command("eval.quality", lambda: run(tyro.cli(Arguments, description=f"{__doc__}\n\n{SAMPLERS}")))


if __name__ == "__main__":
    main()
