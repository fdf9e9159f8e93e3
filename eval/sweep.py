"""Sweep schemes, SNRs, rates, fading, policies and seeds over the link; once killed, it goes on where it was."""

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from rich.table import Table

from eval.measure import console, environment, num_cores
from megjax.channel import FADINGS
from megjax.configs import require
from megjax.metrics import METRICS
from megjax.power import POLICIES
from megjax.runtime import command, prepare_output, use_cpu_devices
from megjax.sweep import Point, SweepConfig, run_sweep
from megjax.system import SCHEMES

IMAGE_POLICY = "runs/power-scenes-rayleigh-0-image/model"
"""Policy that was trained on image PSNR, by the command in `make power`."""
SNRS = (-10.0, -5.0, 0.0, 10.0, 20.0)
CODEC_SNRS = (-10.0, -5.0, 0.0, 5.0, 10.0, 15.0, 20.0)
RAW = ("latent", "latent-wiener", "latent-denoiser")
CODED = ("seed", "seed-klt", "seed-digital")
_CODEC = SweepConfig(snr_db=CODEC_SNRS, modes=("equal_energy",), realisations=1)
_CODEC_LATENTS = dataclasses.replace(
    _CODEC, schemes=(*CODED, *RAW, "opta"), fadings=("rayleigh", "awgn"), rates=(1.0, 2.0, 4.0, 8.0), metrics="latent"
)
PRESETS = {
    "results": {
        "images": SweepConfig(
            schemes=("seed", "latent", "latent-wiener", "centralized", "centralized-coded", "centralized-qam"),
            snr_db=SNRS,
        ),
        "latents": SweepConfig(
            schemes=("seed", "seed-klt", "latent", "opta"),
            snr_db=(-10.0, 0.0, 10.0),
            rates=(1.0, 2.0, 4.0),
            modes=("equal_energy",),
            metrics="latent",
            realisations=100,
        ),
        "policies": SweepConfig(
            schemes=("seed",),
            snr_db=(0.0, 10.0),
            policies=("equal", "static", "codec", "dp", "ppo"),
            modes=("equal_power",),
            realisations=1,
        ),
        "split": SweepConfig(
            schemes=("split", "split-seed", "prompt", "latent", "latent-wiener", "seed"),
            snr_db=(-5.0, 0.0, 5.0),
            server_steps=(0, 20),
            modes=("equal_energy",),
            num_images=500,
            realisations=1,
        ),
    },
    "codec": {
        "images": dataclasses.replace(_CODEC, schemes=CODED + RAW, rates=(1.0, 2.0, 4.0)),
        "images-awgn": dataclasses.replace(_CODEC, schemes=("seed", *RAW), rates=(1.0, 2.0, 4.0), fadings=("awgn",)),
        "images-power": dataclasses.replace(
            _CODEC, schemes=("seed", *RAW), rates=(1.0, 2.0, 4.0), modes=("equal_power",)
        ),
        "latents": dataclasses.replace(_CODEC_LATENTS, modes=("equal_energy", "equal_power")),
        "variants": dataclasses.replace(
            _CODEC_LATENTS, schemes=("seed", "seed:mapping=interleaved"), policies=("codec", "equal")
        ),
    },
    "power": {
        "images": SweepConfig(
            schemes=("seed", "seed:mapping=interleaved"),
            snr_db=(0.0, 10.0),
            policies=("equal", "static", "waterfilling", "dp", "clairvoyant", "ppo", "codec", f"ppo:{IMAGE_POLICY}"),
            modes=("equal_power",),
            num_images=500,
            realisations=1,
        ),
    },
}
"""Sweeps behind docs/results.md, docs/codec-results.md and docs/power-results.md, each in a folder of its name."""
QUICK = {
    "images": {"num_images": 100, "realisations": 2, "snr_db": (-10.0, 0.0, 10.0)},
    "latents": {"num_images": 200, "realisations": 10},
    "policies": {"num_images": 100},
    "split": {"num_images": 100, "snr_db": (-5.0, 5.0), "device_steps": (1, 5), "server_steps": (0,)},
}
"""What is smaller in the same sweeps when time is short."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to sweep and where the results go."""

    config: Annotated[SweepConfig, tyro.conf.arg(name="")] = SweepConfig()
    """The lists of the sweep; all options of it are options of the command."""
    preset: Literal["none", "results", "codec", "power"] = "none"
    """Instead of the lists: the published sweeps of that kind, each in its own folder under --output."""
    quick: bool = False
    """The presets at a size that takes minutes."""
    batch: int = 40
    """Images at a time, over all devices; the numbers do not depend on it beyond rounding."""
    latents: Path = Path("runs/latents")
    """Folder of generated latents, one cache for each model and seed."""
    training: Path | None = None
    """Folder of training latents, for schemes that are fitted on some; by default beside the others."""
    output: Path = Path("outputs/sweep")
    """Results folder: results.parquet, sweep.json and one file for each point."""


def selected(args: Arguments) -> dict[Path, SweepConfig]:
    """The sweeps that are asked for, by results folder."""
    require(args.batch >= 1, "--batch", args.batch, "at least 1")
    if args.preset == "none":
        require(not args.quick, "--quick", True, "used with --preset results")
        return {args.output: args.config}
    untouched = args.config == SweepConfig()
    require(untouched, "--preset", args.preset, "used without options of a sweep")
    require(not args.quick or args.preset == "results", "--quick", True, "used with --preset results")
    changes = QUICK if args.quick else {}
    sweeps = PRESETS[args.preset].items()
    return {args.output / name: dataclasses.replace(config, **changes.get(name, {})) for name, config in sweeps}


def show(frame: pd.DataFrame, folder: Path) -> None:
    """Print one line a point."""
    present = [metric for metric in METRICS if metric.name in frame and frame[metric.name].notna().any()]
    axes = (field.name for field in dataclasses.fields(Point) if field.name not in ("scheme", "mode", "snr_db"))
    lists = [name for name in axes if frame[name].nunique(dropna=False) > 1]
    table = Table("scheme", "mode", "SNR (dB)", *lists, "symbols", *(m.title for m in present), title=str(folder))
    for row in frame.to_dict("records"):
        cells = [row["scheme"], row["mode"], f"{row['snr_db']:g}", *(str(row[name]) for name in lists)]
        values = (f"{row[m.name]:{m.form}}" if pd.notna(row[m.name]) else "-" for m in present)
        table.add_row(*cells, f"{row['num_symbols']:,.0f}", *values)
    console().print(table)


def run(args: Arguments) -> list[pd.DataFrame]:
    """Run the sweeps; returns their tables. ValueError on bad arguments, before any work."""
    sweeps, about = selected(args), environment()
    notes = {"device": about["device"], "commit": about["commit"], "jax": about["versions"]["jax"]}
    notes |= {"megjax": about["versions"]["megjax"], "python": about["python"]}
    for folder in itertools.chain([args.output], sweeps):
        prepare_output(folder)
    frames = []
    for folder, config in sweeps.items():
        frames.append(
            run_sweep(config, folder, latents=args.latents, training=args.training, batch=args.batch, about=notes)
        )
        show(frames[-1], folder)
        print(f"{len(frames[-1])} points: {folder / 'results.parquet'}")
    return frames


def main() -> None:
    use_cpu_devices(num_cores())  # one thread each: faster than all threads on one device

    def start() -> None:
        run(tyro.cli(Arguments, description="\n\n".join([__doc__, *map(str, (SCHEMES, FADINGS, POLICIES))])))

    command("eval.sweep", start, many=True)


if __name__ == "__main__":
    main()
