"""Measure how fast a stage of the library runs on this machine, next to its peers, and write the tables of the docs."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
from rich.table import Table

from eval.measure import ROOT, console, environment, num_cores
from eval.stages import channel, codec, diffusion, power, system
from megjax.configs import read_json, require, require_positive_integers, write_json, write_text
from megjax.runtime import command, use_cpu_devices

HEADER = """# Benchmarks

Made by `python -m eval.benchmark tables` from the JSON files under `benchmarks/`, which commands such as `python -m
eval.benchmark channel` write. Rates are medians over interleaved rounds with quartiles in brackets; the first call
includes tracing and compilation. Bytes written are those of the output, and `copy` is what copying an array of its size
reaches in the same run. Peers do the same job on the same law, but for TDL: Sionna draws the angles of arrival of each
tap anew and its paths have constant modulus, where megjax and the NumPy loop share the angles of a realisation among
its taps and draw Gaussian paths. Sionna has no flat Jakes fading. TDL and Gaussian numbers run at the smallest batch.

Stage `codec` trains the seed codec on random latents: the same network, random links, loss, AdamW with clipping and
schedule, and parameter average in PyTorch as in megjax. Compilation is the first call less a median one. On a GPU all
of them multiply in TF32.

Stage `power` counts environment steps, one for each fading block. Every trainer makes one rollout of a whole episode in
every environment and the same epochs over it, with networks, minibatches and coefficients alike. Rollouts of megjax
begin all episodes at once; the PureJaxRL-style loop steps an environment that has a new episode ready at every step, as
gymnax's does, and in a second version is spared that. stable-baselines3 runs on one thread or on all, whichever is
faster.

Stage `diffusion` calls the U-Net once, for all networks with random weights; guidance needs two inputs an image. Rates
of operations count those of the layers as they are defined, for all; on a CPU megjax's convolutions make fewer, so that
it can pass `matmul`, a product of square matrices in the same numbers and the same run.

Stage `system` takes latents through seed coding, fading, reception and the VAE, every latent over many realisations;
the PyTorch link has the same weights. The loop calls the compiled program once a reception.
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure and where the results go."""

    stage: tyro.conf.Positional[Literal["channel", "codec", "diffusion", "power", "system", "tables"]]
    """"channel", "codec" (training of the seed codec), "diffusion" (the U-Net), "power" (rollouts and PPO), "system"
    (images received a second), or "tables": docs/benchmarks.md from files under --folder."""
    batches: tuple[int, ...] = (4_096, 65_536)
    """Realisations at a time; TDL and the ways to draw Gaussian numbers run at the smallest only. Rollouts of power."""
    preset: Literal["scenes", "tiny"] = "scenes"
    """Codec to train (stage codec)."""
    steps: int = 100
    """Training steps of one call (stage codec)."""
    envs: tuple[int, ...] = (4_096,)
    """Environments of PPO (stage power)."""
    gap_updates: int = 150
    """Length of the training that is timed to 95 % of the gap to the causal optimum, 0 for none (stage power)."""
    model: Literal["sd15", "sd21", "scenes"] = "sd15"
    """Sizes of the U-Net (stage diffusion)."""
    unet_batches: tuple[int, ...] = (2,)
    """Inputs of the U-Net, two for each guided image (stage diffusion)."""
    torch_compile: bool = True
    """Measure torch.compile too (stage diffusion)."""
    images: int = 8
    """Images of the server (stage system)."""
    realisations: int = 250
    """Realisations of the link for each of them (stage system)."""
    receptions: int = 40
    """Receptions at a time (stage system)."""
    rounds: int = 9
    """Samples of each contender."""
    peers: bool = True
    """Measure other software too, where it is installed."""
    folder: Path = ROOT / "benchmarks"
    """Folder of the JSON files."""


def run(args: Arguments) -> None:
    """Measure, print, save; ValueError on bad arguments, before any work."""
    sizes = ("batches", "rounds", "steps", "envs", "unet_batches", "images", "realisations", "receptions")
    require_positive_integers(args, "arguments", sizes)
    require(args.gap_updates >= 0, "--gap-updates", args.gap_updates, "0 or more")
    require(args.rounds >= 3, "--rounds", args.rounds, "3 or more")
    if args.stage == "tables":
        write_tables(args.folder, ROOT / "docs" / "benchmarks.md")
        return
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder {str(args.folder)!r} cannot be made: {error.strerror}") from None
    about = environment()
    if args.stage == "channel":
        (rows, missing), notes = channel.run(args.batches, args.rounds, args.peers), []
    elif args.stage == "power":
        fits = all(num % power.SHAPE["minibatches"] == 0 for num in args.envs)
        require(fits, "--envs", args.envs, f"multiples of {power.SHAPE['minibatches']}, the minibatches")
        rows, missing, notes = power.run(args.batches, args.envs, args.gap_updates, args.rounds, args.peers)
    elif args.stage == "diffusion":
        rows, missing, notes = diffusion.run(args.model, args.unet_batches, args.rounds, args.peers, args.torch_compile)
    elif args.stage == "system":
        sizes = args.images, args.realisations, args.receptions
        rows, missing, notes = system.run(*sizes, args.rounds, args.peers)
    else:
        rows, missing, notes = codec.run(args.preset, args.steps, args.rounds, args.peers)
    result = {**about, "stage": args.stage, "rows": rows, "missing_peers": missing, "notes": notes}
    path = args.folder / f"{args.stage}-{slug(about['device'])}.json"
    write_json(path, result)
    show(result)
    print(f"written: {path}")


def slug(device: str) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cells(row) -> list[str]:
    """One line of a table: implementation, rate with quartiles, first call, bytes written, share of a copy."""
    low, high = row.per_second_quartiles
    return [
        row.implementation,
        f"{row.per_second / 1e3:,.1f} [{low / 1e3:,.1f}, {high / 1e3:,.1f}]",
        f"{row.first_call_s:.2f}",
        f"{row.bytes_written_per_second / 1e9:.2f}",
        f"{100 * row.share_of_copy:.0f} %",
    ]


COLUMNS = ["implementation", "thousand realisations/s", "first call (s)", "GB/s written", "of copy"]
LAYOUTS = {"channel": (COLUMNS, cells)} | {
    name: (stage.COLUMNS, stage.cells)
    for name, stage in (("codec", codec), ("diffusion", diffusion), ("power", power), ("system", system))
}


def show(result: dict) -> None:
    """Print one table per case and batch."""
    screen = console()
    columns, line = LAYOUTS[result["stage"]]
    frame = pd.DataFrame(result["rows"])
    for (case, batch), group in frame.groupby(["case", "batch"], sort=False):
        table = Table(title=f"{case}; batch {batch:,}", title_justify="left")
        for column in columns:
            table.add_column(column, no_wrap=column == columns[0])
        for row in group.itertuples():
            table.add_row(*line(row))
        screen.print(table)
    for name in result["missing_peers"]:
        screen.print(f"{name}: not installed; `make peers` installs it")
    for note in result["notes"]:
        screen.print(note)


def write_tables(folder: Path, path: Path) -> None:
    """Rewrite the page of tables from every JSON file in the folder."""
    files = sorted(folder.glob("*.json"))
    require(bool(files), "--folder", str(folder), "a folder with the JSON files of earlier runs")
    parts = [HEADER]
    for file in files:
        result = read_json(file)
        columns, line = LAYOUTS[result["stage"]]
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts.append(f"## {result['stage']}: {result['device']}, {result['cpu_cores']} cores\n")
        parts.append(f"Commit {result['commit']}, Python {result['python']}, {versions}.\n")
        for (case, batch), group in pd.DataFrame(result["rows"]).groupby(["case", "batch"], sort=False):
            lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
            lines += ["| " + " | ".join(line(row)) + " |" for row in group.itertuples()]
            parts.append(f"**{case}; batch {batch:,}**\n\n" + "\n".join(lines) + "\n")
        parts += [f"{name}: not installed where this was measured.\n" for name in result["missing_peers"]]
        parts += [f"{note}\n" for note in result.get("notes", [])]
    write_text(path, "\n".join(parts))
    print(f"written: {path}")


def main() -> None:
    def body() -> None:
        args = tyro.cli(Arguments, description=__doc__)
        if args.stage == "system":
            use_cpu_devices(num_cores())  # as eval.sweep does
        run(args)

    command("eval.benchmark", body)


if __name__ == "__main__":
    main()
