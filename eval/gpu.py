"""Measure the stages on a GPU that is there for minutes only: the most important first, the rest in a later call."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from eval.benchmark import slug
from eval.measure import ROOT
from eval.peers.lines import last_error
from eval.stages import summary
from eval.stages.codec import NOT_ASKED
from megjax.configs import read_json, require, write_json
from megjax.runtime import command, prepare_output


class Part(NamedTuple):
    """One call of `eval.benchmark`, in a process of its own."""

    name: str
    limit_s: float
    """How long it may take; it is not begun where less is left."""
    words: tuple[str, ...]
    """Stage and options; those of `COMMON` come on top."""

    @property
    def stage(self) -> str:
        return self.words[0]


def _part(name: str, limit_s: float, words: str) -> Part:
    return Part(name, limit_s, tuple(words.split()))


EAGER, COMPILED = "--no-torch-compile", "--no-ours"
PARTS = (
    _part("unet-1", 150, f"diffusion --unet-batches 2 --ceilings {EAGER}"),
    _part("unet-16", 150, f"diffusion --unet-batches 32 {EAGER}"),
    _part("image-1", 150, f"image --image-batches 1 {EAGER}"),
    _part("channel", 60, "channel"),
    _part("codec", 60, f"codec {EAGER}"),
    _part("power", 90, "power"),
    _part("system", 120, f"system {EAGER}"),
    _part("unet-1-compiled", 150, f"diffusion --unet-batches 2 {COMPILED}"),
    _part("unet-16-compiled", 150, f"diffusion --unet-batches 32 {COMPILED}"),
    _part("image-1-compiled", 150, f"image --image-batches 1 {COMPILED}"),
    _part("codec-compiled", 100, f"codec {COMPILED}"),
    _part("system-compiled", 120, f"system {COMPILED}"),
    _part("unet-8", 150, f"diffusion --unet-batches 16 {EAGER}"),
    _part("unet-8-compiled", 150, f"diffusion --unet-batches 16 {COMPILED}"),
    _part("image-16", 150, f"image --image-batches 16 {EAGER}"),
)
"""The most important first. Compilers of other software, which may take longest, have parts of their own."""
COMMON = (
    "--no-ceilings --rounds 5 --batches 65536 --no-gaussians --gap-updates 0 --image-calls 5 --images 8 --realisations "
    "500 --receptions 2000"
)
QUICK = (
    "--model scenes --preset tiny --steps 2 --rounds 3 --batches 256 --envs 64 --image-steps 2 --image-calls 1 "
    "--images 2 --realisations 20 --receptions 10"
)
ENVIRON = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Of the parts: memory as they need it, no questions to a network, and few messages."""
LATE = "took longer than"
BENCHMARK = (sys.executable, "-m", "eval.benchmark")
ABOUT = (sys.executable, "-c", "import json; from eval.measure import environment; print(json.dumps(environment()))")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How long to measure, what, and where the results go."""

    minutes: float = 4.5
    """No part is begun that might take longer than is left of them."""
    output: Path = ROOT / "outputs" / "gpu"
    """Folder of the JSON files, one a stage; a later call adds what is missing."""
    parts: tuple[str, ...] = tuple(part.name for part in PARTS)
    """What to measure, by default everything."""
    quick: bool = False
    """Tiny sizes, on whatever device there is, to try it out."""
    commit: str | None = None
    """Commit of the code, where there is no git to tell."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What `run` has of the outside, for tests to replace."""

    about: Callable[[Mapping[str, str]], dict[str, Any]]
    """Device, versions and commit, given the environment's variables."""
    execute: Callable[[list[str], float, Mapping[str, str]], str | None]
    """Run a command for so many seconds at most with these variables; a line on what went wrong."""
    clock: Callable[[], float] = time.monotonic


def run(args: Arguments, machine: Machine | None = None) -> list[str]:
    """Measure parts until none fits into what is left; names of those still missing. ValueError on bad arguments."""
    machine = machine or Machine(about, execute)
    end = machine.clock() + 60 * args.minutes
    names = [part.name for part in PARTS]
    for name in args.parts:
        require(name in names, "--parts", name, f"some of {', '.join(names)}")
    require(args.minutes > 0, "--minutes", args.minutes, "more than 0")
    prepare_output(args.output)
    environ = ENVIRON | ({} if args.quick else {"JAX_PLATFORMS": "cuda,cpu"})
    found = machine.about(environ)
    gpu = args.quick or found["platform"] == "gpu"
    require(gpu, "the device", found["device"], "a GPU that JAX can use (--quick does without)")
    found |= {"commit": args.commit or found["commit"], "quick": args.quick}
    check_same(args.output, found)
    tried = {name: made for path in files(args.output) for name, made in read_json(path)["parts"].items()}
    todo = [part for part in PARTS if part.name in args.parts and not tried.get(part.name, {}).get("measured")]
    todo.sort(key=lambda part: part.name in tried)  # what failed before comes last, with all the time that is left
    missing = [part.name for part in todo]
    while part := next((part for part in todo if part.limit_s <= end - machine.clock()), None):
        todo.remove(part)
        started = machine.clock()
        if part.name in tried:
            part = part._replace(limit_s=end - started)
        made, problem = measure(part, args.quick, environ, machine)
        in_time = problem and not problem.startswith(LATE) and part.limit_s <= end - machine.clock()
        if in_time and COMPILED not in part.words:  # other software may be the reason
            made, _ = measure(part._replace(words=(*part.words, "--no-peers")), args.quick, environ, machine)
        seconds = machine.clock() - started
        write(args.output, part, found, made, {"measured": made is not None, "problem": problem, "seconds": seconds})
        missing.remove(part.name) if made is not None else None
        notes = [note for note in (made or {}).get("notes", []) if "was not measured" in note and NOT_ASKED not in note]
        print(": ".join([part.name, f"{seconds:.0f} s", *filter(None, [problem]), *notes]), flush=True)
    return missing


def measure(
    part: Part, quick: bool, environ: Mapping[str, str], machine: Machine
) -> tuple[dict[str, Any] | None, str | None]:
    """What `eval.benchmark` wrote, if anything, and what went wrong, if anything.

    Nothing that was compiled before is found again: what is told of compilation is of all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage, *options = part.words
        words = [stage, *COMMON.split(), *options, *(QUICK.split() if quick else ()), "--folder", folder]
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        problem = machine.execute([*BENCHMARK, *words], part.limit_s, {**environ, **caches})
        made = [read_json(path) for path in Path(folder).glob(f"{stage}-*.json")] if problem is None else []
    if problem is None and not (made and made[0]["rows"]):
        return None, "; ".join(made[0]["notes"] if made else []) or "nothing was measured"
    return (made[0] if made else None), problem


def write(folder: Path, part: Part, about: dict, made: dict | None, how: dict[str, Any]) -> None:
    """Add what a part measured, if anything, to its stage's file.

    What was measured in an earlier part, and again beside what this one is about, is kept as such.
    """
    path = folder / f"{part.stage}-{slug(about['device'])}.json"
    empty = {**about, "stage": part.stage, "ceilings": None, "rows": [], "missing_peers": [], "notes": [], "parts": {}}
    result = read_json(path) if path.exists() else empty
    mark = f"Part {part.name}: "
    notes = [note for note in result["notes"] if not note.startswith(mark)]
    if made is not None:
        known = {(row["case"], row["batch"], row["implementation"]) for row in result["rows"]}
        for row in made["rows"]:
            again = (row["case"], row["batch"], row["implementation"]) in known
            result["rows"].append(row | {"implementation": row["implementation"] + ", again" * again})
        result["ceilings"] = result["ceilings"] or made["ceilings"]
        result["missing_peers"] += [name for name in made["missing_peers"] if name not in result["missing_peers"]]
        notes += [note for note in made["notes"] if note not in notes and NOT_ASKED not in note]
    if how["problem"]:
        notes.append(f"{mark}{how['problem']}." + " Measured without other software." * how["measured"])
    write_json(path, {**result, "notes": notes, "parts": result["parts"] | {part.name: how}})


def files(folder: Path) -> list[Path]:
    """Results of earlier calls."""
    stages = {part.stage for part in PARTS}
    return sorted(path for stage in stages for path in folder.glob(f"{stage}-*.json"))


def check_same(folder: Path, about: dict[str, Any]) -> None:
    """ValueError unless the folder's results, if any, are of the same machine, versions and commit."""
    for path in files(folder):
        earlier = read_json(path)
        require(
            "parts" in earlier, "--output", str(folder), f"a folder of eval.gpu's own files, which {path.name} is not"
        )
        for name, value in about.items():
            same = f"another folder, as {path.name} has {name} {earlier.get(name)!r} and this is {value!r}"
            require(earlier.get(name) == value, "--output", str(folder), same)


def about(environ: Mapping[str, str]) -> dict[str, Any]:
    """`eval.measure.environment` of a process that has these variables; ValueError if it ends with an error."""
    made = subprocess.run(ABOUT, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)
    if made.returncode:
        raise ValueError(f"JAX cannot use this machine's devices: {last_error(made.stderr)}")
    return json.loads(made.stdout.splitlines()[-1])


def execute(words: list[str], limit_s: float, environ: Mapping[str, str]) -> str | None:
    """Run a command and leave nothing of what it started; a line on what went wrong, if anything."""
    with tempfile.TemporaryFile("w+") as errors:
        options = {"stdout": subprocess.DEVNULL, "stderr": errors, "process_group": 0}
        process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environ}, **options)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"{LATE} {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        text = errors.read()
    if status == 0:
        return None
    print(text[-2_000:], file=sys.stderr, flush=True)
    return last_error(text) or f"ended with code {status}"


def main() -> None:
    def body() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part that runs, too
        args = tyro.cli(Arguments, description=__doc__)
        missing = run(args)
        print(summary.table([read_json(path) for path in files(args.output)]))
        print(f"written: {args.output}; missing: {', '.join(missing) or 'nothing'}")

    command("eval.gpu", body)


if __name__ == "__main__":
    main()
