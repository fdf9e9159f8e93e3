"""Measure how fast a stage of the library runs on this machine, next to its peers, and write the tables of the docs."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import tyro
from rich.table import Table

from eval import markdown
from eval.measure import ROOT, ceilings, console, environment, num_cores
from eval.stages import STAGES, summary
from megjax.configs import read_json, require, require_positive_integers, write_json
from megjax.files import write_text
from megjax.runtime import command, use_cpu_devices

HEADER = """# Benchmarks

Made by `python -m eval.benchmark tables` from the JSON files under `benchmarks/`, which commands such as `python -m
eval.benchmark channel` write. Rates are medians over interleaved rounds with quartiles in brackets; the first call
includes tracing and compilation. `python -m eval.gpu` measures these stages in parts; "again" marks what was measured a
second time beside what a later part is about.

On a GPU float32 networks, PyTorch's too, multiply in TF32. PyTorch's setting holds for all of a process, so that
products in its links of stages `codec` and `system` may be rounded as well; megjax's are exact there, and in stage
`channel` those of both are.

In stage `channel`, bytes written are those of the output, and `copy` is what copying an array of its size reaches in
the same run. Peers do the same job on the same law, but for TDL: Sionna draws the angles of arrival of each tap anew
and its paths have constant modulus, where megjax and the NumPy loop share the angles of a realisation among its taps
and draw Gaussian paths. Sionna has no flat Jakes fading. TDL and Gaussian numbers run at the smallest batch.

Stage `codec` trains the seed codec on random latents: the same network, random links, loss, AdamW with clipping and
schedule, and parameter average in PyTorch as in megjax. Compilation is the first call less a median one.

Stage `power` counts environment steps, one for each fading block. Every trainer makes one rollout of a whole episode in
every environment and the same epochs over it, with networks, minibatches and coefficients alike. Rollouts of megjax
begin all episodes at once; the PureJaxRL-style loop steps an environment that has a new episode ready at every step, as
gymnax's does, and in a second version is spared that. stable-baselines3 runs on one thread or on all, whichever is
faster.

Stage `diffusion` calls the U-Net once, for all networks with random weights. Its batch counts inputs, of which guidance
needs two an image: batch 2 is one guided image, batch 32 are sixteen. Guided steps a second are calls, image-steps the
same times those images. Rates of operations count those of the layers as they are defined, for all; on a CPU megjax's
convolutions make fewer, so that it can pass `matmul`, a product of square matrices in the same numbers and run. Memory
is what megjax's program holds by XLA's account, and what PyTorch allocates on a GPU, weights included.

Stage `image` makes a whole image from token ids, with text encoder and image decoder, each sample in a process of its
own; with `--image-calls`, as in `eval.gpu`, each implementation keeps one process, and these are called in turn. Peak
memory, weights included, is the largest that a process held during the call. On a GPU it is what was allocated there:
by megjax and the old Flax from the start of the process, compilation included, by PyTorch after its first image.
Compilation of megjax and of the old Flax is of the whole program, that of PyTorch its first image, of one step.

Stage `layers` times the ways to compute the costly layers of Stable Diffusion 1.5, `guidance` what guidance in an
interval of the steps costs and gains, `scaling` how the cost of an image grows, `startup` what a new process takes to
its first image, `limits` what every stage's program reaches of the machine's operations and bytes a second, and
`profile` names the functions that take most of its time.

Stage `system` takes latents through seed coding, fading, reception and the VAE, every latent over many realisations;
the PyTorch link has the same weights. The loop calls the compiled program once a reception.
"""


STAGE_HELP = ", ".join(f'"{stage.name}" ({stage.title})' for stage in STAGES)
STAGE_HELP += """, "all" of them one after the other, or "tables": docs/benchmarks.md from the files under benchmarks/,
or the same page of another --folder, in it."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.benchmark`: stages to measure, their sizes, and the folder of the results."""

    stage: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="STAGE", help=STAGE_HELP)]]
    batches: tuple[int, ...] = (4_096, 65_536)
    """Realisations at a time; TDL and the ways to draw Gaussian numbers run at the smallest only. Rollouts of power."""
    preset: Literal["scenes", "tiny"] = "scenes"
    """Codec to train (stage codec)."""
    steps: int = 100
    """Training steps of one call (stage codec)."""
    envs: tuple[int, ...] = (4_096,)
    """Environments of PPO (stage power)."""
    gaussians: bool = True
    """Compare ways to draw Gaussian numbers too (stage channel)."""
    gap_updates: int = 150
    """Length of the training that is timed to 95 % of the gap to the causal optimum, 0 for none (stage power)."""
    model: Literal["sd15", "sd21", "scenes"] = "sd15"
    """Sizes of the networks (stages diffusion and image)."""
    unet_batches: tuple[int, ...] = (2,)
    """Inputs of the U-Net, two for each guided image (stage diffusion)."""
    torch_compile: bool = True
    """Measure torch.compile too (stages codec, diffusion, image and system)."""
    image_steps: int = 25
    """Guided steps of an image (stage image)."""
    image_batches: tuple[int, ...] = (1,)
    """Images at a time (stage image)."""
    image_calls: int = 0
    """Samples, if any, that all come from one process of each implementation, started once (stage image)."""
    captions: int = 500
    """Held-out captions, a multiple of 50 (stage guidance)."""
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
    ours: bool = True
    """Measure megjax, and not only other software (stages codec, diffusion, image and system)."""
    ceilings: bool = True
    """Measure what the device reaches when nothing is in its way."""
    folder: Path = ROOT / "benchmarks"
    """Folder of the JSON files."""


def run(args: Arguments) -> None:
    """Measure, print, save; ValueError on bad arguments, before any work."""
    sizes = ("batches", "rounds", "steps", "envs", "unet_batches", "images", "realisations", "receptions")
    require_positive_integers(args, "arguments", (*sizes, "image_steps", "image_batches", "captions"))
    if args.stage == "tables":
        default = args.folder.resolve() == ROOT / "benchmarks"
        write_tables(args.folder, ROOT / "docs" / "benchmarks.md" if default else args.folder / "benchmarks.md")
        return
    stage = STAGES.find(args.stage, "stage")
    require(args.rounds >= stage.fewest_rounds, "--rounds", args.rounds, f"{stage.fewest_rounds} or more")
    required = args.ceilings or not stage.needs_ceilings
    require(required, "--no-ceilings", "given", f"left out: stage {stage.name} needs them")
    stage.check(args)
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--folder {str(args.folder)!r} cannot be made: {error.strerror}") from None
    about = {**environment(), "stage": args.stage, "ceilings": ceilings() if args.ceilings else None}
    rows, missing, notes = stage.run(args, about["ceilings"] or {})
    result = {**about, "rows": rows, "missing_peers": missing, "notes": notes}
    path = args.folder / f"{args.stage}-{slug(about['device'])}.json"
    write_json(path, result)
    show(result)
    print(f"written: {path}")


def run_all(args: Arguments, words: list[str]) -> None:
    """Every stage in a process of its own, whose settings of JAX differ; one that fails does not stop the others."""
    failed = []
    for stage in STAGES.names:
        print(f"stage {stage}", flush=True)
        if subprocess.run([sys.executable, "-m", "eval.benchmark", stage, *words]).returncode:
            failed.append(stage)
    require(not failed, "stages that failed", failed, "none; what they said is above")


def slug(device: str) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def show(result: dict) -> None:
    """Print one table per case and batch."""
    screen = console()
    stage = STAGES.find(result["stage"])
    for case, batch, group in groups(result):
        table = Table(title=title(case, batch), title_justify="left")
        for column in stage.columns:
            table.add_column(column, no_wrap=column == stage.columns[0])
        for row in group.itertuples():
            table.add_row(*stage.cells(row))
        screen.print(table)
    for name in result["missing_peers"]:
        screen.print(f"{name}: not installed; `make peers` installs it")
    for note in result["notes"]:
        screen.print(note)


def groups(result: dict) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Rows of each case and batch."""
    if result["rows"]:
        frame = pd.DataFrame(result["rows"])
        yield from ((*of, group) for of, group in frame.groupby(["case", "batch"], sort=False))


def title(case: str, batch: int) -> str:
    """Of a table; batch 0 is none."""
    return f"{case}; batch {batch:,}" if batch else case


def ceilings_line(found: dict[str, float] | None) -> str:
    """Ceilings that the device reached in the same run; nothing for files from before it was measured."""
    if not found:
        return ""
    products = ", ".join(f"{found[f'matmul_{kind}'] / 1e12:.3g} in {kind}" for kind in ("float32", "bfloat16"))
    return f"Ceilings in this run: matrix products {products} TFLOP/s, copy {found['copy_bytes'] / 1e9:.3g} GB/s.\n"


def write_tables(folder: Path, path: Path) -> None:
    """Rewrite the page of tables from every JSON file in the folder."""
    files = sorted(folder.glob("*.json"))
    require(bool(files), "--folder", str(folder), "a folder with the JSON files of earlier runs")
    results = [read_json(file) for file in files]
    parts = [HEADER]
    if found := summary.table(results):
        parts.append(f"## Next to others\n\n{found}")
    for result in results:
        stage = STAGES.find(result["stage"])
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts.append(f"## {result['stage']}: {result['device']}, {result['cpu_cores']} cores\n")
        parts.append(f"Commit {result['commit']}, Python {result['python']}, {versions}.\n")
        parts += [ceiling] if (ceiling := ceilings_line(result.get("ceilings"))) else []
        for case, batch, group in groups(result):
            lines = markdown.table(stage.columns, (stage.cells(row) for row in group.itertuples()))
            parts.append(f"**{title(case, batch)}**\n\n{lines}")
        parts += [f"{name}: not installed where this was measured.\n" for name in result["missing_peers"]]
        parts += [f"{note}\n" for note in result.get("notes", [])]
    write_text(path, "\n".join(parts))
    print(f"written: {path}")


def main() -> None:
    def body() -> None:
        # Each process of a stage needs its share of a GPU's memory, of which JAX would take most at the first use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        args = tyro.cli(Arguments, description=__doc__)
        if args.stage == "all":
            run_all(args, [word for word in sys.argv[1:] if word != "all"])
            return
        if args.stage in STAGES and STAGES.find(args.stage).splits_cpu:
            use_cpu_devices(num_cores())
        run(args)

    command("eval.benchmark", body)


if __name__ == "__main__":
    main()
