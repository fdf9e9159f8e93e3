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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from eval.benchmark import slug
from eval.measure import ROOT
from eval.peers.lines import last_error
from eval.stages import summary
from eval.stages.codec import COMPILED, NOT_ASKED
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

    @property
    def has_megjax(self) -> bool:
        """Whether megjax is measured in it, and not only other software."""
        return NO_MEGJAX not in self.words


def _part(name: str, limit_s: float, words: str) -> Part:
    return Part(name, limit_s, tuple(words.split()))


NO_COMPILER, NO_MEGJAX, NO_PEERS = "--no-torch-compile", "--no-ours", "--no-peers"
PARTS = (
    _part("unet-1", 150, f"diffusion --unet-batches 2 --ceilings {NO_COMPILER}"),
    _part("unet-16", 150, f"diffusion --unet-batches 32 {NO_COMPILER}"),
    _part("image-1", 150, f"image --image-batches 1 {NO_COMPILER}"),
    _part("channel", 60, "channel"),
    _part("codec", 60, f"codec {NO_COMPILER}"),
    _part("power", 90, "power"),
    _part("system", 120, f"system {NO_COMPILER}"),
    _part("unet-1-compiled", 150, f"diffusion --unet-batches 2 {NO_MEGJAX}"),
    _part("unet-16-compiled", 150, f"diffusion --unet-batches 32 {NO_MEGJAX}"),
    _part("image-1-compiled", 150, f"image --image-batches 1 {NO_MEGJAX}"),
    _part("codec-compiled", 100, f"codec {NO_MEGJAX}"),
    _part("system-compiled", 120, f"system {NO_MEGJAX}"),
    _part("unet-8", 150, f"diffusion --unet-batches 16 {NO_COMPILER}"),
    _part("unet-8-compiled", 150, f"diffusion --unet-batches 16 {NO_MEGJAX}"),
    _part("image-16", 150, f"image --image-batches 16 {NO_COMPILER}"),
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
"""Variables of every part's environment: JAX takes memory as it needs it, nothing asks a network, few messages."""
LATE = "took longer than"
ALONE = 0.5
"""Share of a part's limit that must be left to measure megjax without other software."""
MEGJAX = "megjax"
BENCHMARK = (sys.executable, "-m", "eval.benchmark")
ABOUT_LIMIT_S = 60.0
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
    """Access to the machine: its description, processes on it and a clock. Tests give others."""

    about: Callable[[Mapping[str, str]], dict[str, Any]]
    """Device, versions and commit, given the environment's variables."""
    execute: Callable[[list[str], float, Mapping[str, str]], str | None]
    """Run a command for so many seconds at most with these variables; a line on what went wrong."""
    clock: Callable[[], float] = time.monotonic


class Outcome(NamedTuple):
    """Result of the latest attempt at a part, as its stage's file keeps it under `parts`."""

    measured: bool
    """Whether the file has the figure that the part is about."""
    seconds: float
    limit_s: float
    """Limit that the attempt had."""
    problem: str | None
    """Reason why the whole part could not be measured."""
    alone: bool = False
    """Whether megjax was tried without other software."""
    problem_alone: str | None = None
    """Reason why that failed, too."""

    @property
    def note(self) -> str | None:
        """Remark in the tables on a part that went wrong; None if nothing did."""
        if not self.problem:
            return None
        if self.measured:
            return f"{self.problem}. Measured without other software."
        return self.problem + (f"; without other software: {self.problem_alone}" if self.alone else "") + "."


class Attempt(NamedTuple):
    """A part to be measured, whole or without other software."""

    part: Part
    earlier: Outcome | None = None
    alone: bool = False
    """Measure megjax only."""

    @property
    def needed_s(self) -> float:
        """Seconds that must be left."""
        return self.part.limit_s * (ALONE if self.alone else 1)


def attempts(names: Collection[str], earlier: Mapping[str, Outcome]) -> list[Attempt]:
    """Attempts at parts of the benchmark that are still to be made, in order:

    - megjax alone, of parts that failed and where it has not been tried alone with the part's whole limit;
    - parts that were not tried;
    - parts that failed, megjax alone where the whole part took too long.
    """
    first, untried, failed = [], [], []
    for part in (part for part in PARTS if part.name in names):
        outcome = earlier.get(part.name)
        if outcome is None:
            untried.append(Attempt(part))
        elif not outcome.measured:
            late_alone = is_late(outcome.problem_alone) and outcome.limit_s < part.limit_s
            if part.has_megjax and (late_alone or not outcome.alone):
                first.append(Attempt(part, outcome, alone=True))
            else:
                failed.append(Attempt(part, outcome, alone=part.has_megjax and is_late(outcome.problem)))
    return [*first, *untried, *failed]


def is_late(problem: str | None) -> bool:
    """Whether a problem is a time limit that was reached."""
    return (problem or "").startswith(LATE)


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
    facts = machine.about(environ)
    gpu = args.quick or facts["platform"] == "gpu"
    require(gpu, "the device", facts["device"], "a GPU that JAX can use (--quick does without)")
    facts |= {"commit": args.commit or facts["commit"], "quick": args.quick}
    check_same(args.output, facts)
    saved = [item for path in files(args.output) for item in read_json(path)["parts"].items()]
    outcomes = {name: Outcome(**fields) for name, fields in saved}
    todo = attempts(args.parts, outcomes)
    while attempt := next((one for one in todo if one.needed_s <= end - machine.clock()), None):
        todo.remove(attempt)
        part, started = attempt.part, machine.clock()
        limit_s = end - started  # everything for a repeated attempt that nothing else waits for
        if attempt.earlier is None or any(one.earlier is None for one in todo):
            limit_s = min(limit_s, part.limit_s)
        result, problem = measure(attempt, limit_s, args.quick, environ, machine)
        seconds = machine.clock() - started
        if attempt.alone:
            outcome = Outcome(problem is None, seconds, limit_s, attempt.earlier.problem, True, problem)
        else:
            outcome = Outcome(problem is None, seconds, limit_s, problem)
        outcomes[part.name] = outcome
        write(args.output, part, facts, result, outcome)
        if problem and part.has_megjax and not attempt.alone:  # other software may be the reason
            todo.insert(0, Attempt(part, outcome, alone=True))
        notes = [note for note in problems_among(result["notes"] if result else []) if note not in (problem or "")]
        print(": ".join([part.name, f"{seconds:.0f} s", *filter(None, [outcome.note]), *notes]), flush=True)
    measured = {name for name, outcome in outcomes.items() if outcome.measured}
    return [name for name in names if name in args.parts and name not in measured]


def measure(
    attempt: Attempt, limit_s: float, quick: bool, environ: Mapping[str, str], machine: Machine
) -> tuple[dict[str, Any] | None, str | None]:
    """Result of `eval.benchmark`, if it wrote one, and why the part is not measured, if it is not.

    Caches of compiled programs start empty, so that compilation is measured whole.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a killed process may still be writing
        stage, *options = attempt.part.words
        words = [stage, *COMMON.split(), *options, *(QUICK.split() if quick else ())]
        words += [*([NO_PEERS] if attempt.alone else []), "--folder", folder]
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        problem = machine.execute([*BENCHMARK, *words], limit_s, {**environ, **caches})
        results = [read_json(path) for path in Path(folder).glob(f"{stage}-*.json")] if problem is None else []
    if problem is not None:
        return None, problem
    return (results[0], what_is_missing(attempt.part, results[0])) if results else (None, "no result was written")


def what_is_missing(part: Part, result: dict[str, Any]) -> str | None:
    """Why a result lacks the figure that the part is about: megjax's, or that of a compiler of other software."""
    names = [row["implementation"] for row in result["rows"]]
    if MEGJAX in names if part.has_megjax else any(name.startswith(COMPILED) for name in names):
        return None
    absent = [] if part.has_megjax else [f"{name} is not installed" for name in result["missing_peers"]]
    return "; ".join(problems_among(result["notes"]) or absent) or "it was not measured"


def problems_among(notes: list[str]) -> list[str]:
    """Notes on implementations that were to be measured and were not."""
    return [note.rstrip(".") for note in notes if "was not measured" in note and NOT_ASKED not in note]


def write(folder: Path, part: Part, facts: dict[str, Any], result: dict[str, Any] | None, outcome: Outcome) -> None:
    """Add a part's result, if there is one, to its stage's file.

    A row that the file has from an earlier part, or an earlier attempt, stays; the new one is marked `AGAIN` there.
    """
    path = folder / f"{part.stage}-{slug(facts['device'])}.json"
    empty = {**facts, "stage": part.stage, "ceilings": None, "rows": [], "missing_peers": [], "notes": [], "parts": {}}
    merged = read_json(path) if path.exists() else empty
    mark = f"Part {part.name}: "
    notes = [note for note in merged["notes"] if not note.startswith(mark)]
    if result is not None:
        rows = {(row["case"], row["batch"], row["implementation"]): row for row in merged["rows"]}
        for row in result["rows"]:
            *of, name = row["case"], row["batch"], row["implementation"]
            name += summary.AGAIN if (*of, name) in rows else ""
            rows[*of, name] = row | {"implementation": name}
        merged["rows"] = list(rows.values())
        merged["ceilings"] = merged["ceilings"] or result["ceilings"]
        merged["missing_peers"] += [name for name in result["missing_peers"] if name not in merged["missing_peers"]]
        notes += [note for note in result["notes"] if note not in notes and NOT_ASKED not in note]
    notes += [mark + outcome.note] if outcome.note else []
    write_json(path, {**merged, "notes": notes, "parts": merged["parts"] | {part.name: outcome._asdict()}})


def files(folder: Path) -> list[Path]:
    """Results of earlier calls."""
    stages = {part.stage for part in PARTS}
    return sorted(path for stage in stages for path in folder.glob(f"{stage}-*.json"))


def check_same(folder: Path, facts: dict[str, Any]) -> None:
    """ValueError unless the folder's results, if any, are of the same machine, versions and commit."""
    for path in files(folder):
        earlier = read_json(path)
        require(
            "parts" in earlier, "--output", str(folder), f"a folder of eval.gpu's own files, which {path.name} is not"
        )
        for name, value in facts.items():
            same = f"another folder, as {path.name} has {name} {earlier.get(name)!r} and this is {value!r}"
            require(earlier.get(name) == value, "--output", str(folder), same)


def about(environ: Mapping[str, str]) -> dict[str, Any]:
    """`eval.measure.environment` of a process that has these variables; ValueError if it fails or hangs."""
    options = {"cwd": ROOT, "env": {**os.environ, **environ}, "capture_output": True, "text": True}
    try:
        process = subprocess.run(ABOUT, timeout=ABOUT_LIMIT_S, **options)
    except subprocess.TimeoutExpired:
        raise ValueError(f"JAX cannot use this machine's devices: {LATE} {ABOUT_LIMIT_S:.0f} s") from None
    if process.returncode:
        raise ValueError(f"JAX cannot use this machine's devices: {last_error(process.stderr)}")
    return json.loads(process.stdout.splitlines()[-1])


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
