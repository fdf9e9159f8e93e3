"""Compile a job for a TPU topology on a machine without one: memory, operations, collectives and roofline time."""

import dataclasses
import gc
import hashlib
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.table import Table

from eval import aot_tables
from eval.aot_jobs import JOBS, MODELS, Jobs, Program
from eval.measure import console
from megjax.configs import read_json, require, require_positive_integers, write_json
from megjax.cost import cost_of_compiled, roofline
from megjax.runtime import command
from megjax.tpu import TpuConfig

GIB = 2**30
STACK_BYTES = 4 * 2**20
HBM_SHARE = 0.97
"""Share of the HBM that a program may take: the rest is the runtime's."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile, and for which topology."""

    tpu_config: Path = Path("tpu_configs/v5e-8.json")
    """A file of tpu_configs/."""
    job: str = "generate"
    """generate, sweep, codec, power or ldm."""
    model_config: str = "sd15"
    """sd15, sd21 or scenes: sizes only, no weights."""
    steps: int = 25
    """Denoising steps of `generate`."""
    guidance: float = 7.5
    """Classifier-free guidance scale of `generate`; 1 turns it off."""
    all: bool = False
    """Compile the whole list of jobs and topologies of docs/tpu.md instead, what is there already left out."""
    stop_after_minutes: float = 0.0
    """With --all: begin no compilation after so many minutes; 0 is no limit."""
    output: Path = Path("benchmarks/aot")
    """Folder of the results, one JSON file a job."""
    table: Path | None = None
    """Also write the tables of all results there."""


def plan(folder: Path) -> list[tuple[Path, str, str]]:
    """(file, job, model) of the whole list: the bundled model's jobs, then Stable Diffusion 1.5 chip by chip."""
    first = folder / "v5e-8.json"
    chips = [folder / f"{name}.json" for name in ("v5e-8", "v6e-8", "v5p-4", "v4-4", "tpu7x-4")]
    rest = sorted(path for path in folder.glob("*.json") if path not in chips)
    listed = [(first, job, "scenes") for job in ("codec", "power", "sweep", "generate", "ldm")]
    wider = [folder / f"{name}.json" for name in ("v5e-64", "v5e-256")]
    listed += [(path, "codec", "scenes") for path in wider]
    listed += [(path, "generate", "sd15") for path in chips]
    listed += [(first, "sweep", "sd15"), (first, "codec", "sd15")]
    listed += [(path, job, "scenes") for path in chips[1:] for job in ("codec", "power")]
    listed += [(path, "generate", "sd15") for path in rest]
    listed += [(first, "generate", "sd21"), *((path, "ldm", "sd15") for path in chips)]
    listed += [(path, "ldm", "sd15") for path in wider]
    return listed


def identity(args: Arguments, config: TpuConfig, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What a result depends on: the program, the flags, and the compiler."""
    return {
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "flags": list(config.xla_flags),
        "jax": jax.__version__,
        "libtpu": metadata.version("libtpu"),
    }


def measure(args: Arguments, config: TpuConfig, program: Program, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Compile and account; ValueError if it does not fit the chip."""
    started = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=config.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise ValueError(f"{config.topology}: {reason}") from None
        raise ValueError(
            f"{args.tpu_config}: {args.job} does not fit the HBM; lower {program.knob} ({reason})"
        ) from None
    seconds = time.monotonic() - started
    once, cost = (cost_of_compiled(compiled, repeat_loops=repeat) for repeat in (False, True))
    share = config.generation.devices_per_chip
    bounds = roofline(cost, config.chip, share)
    memory, hbm = cost.memory, config.chip.hbm_bytes / share
    result = {
        "topology": config.topology,
        "job": args.job,
        "model": args.model_config,
        "devices": config.num_devices,
        "items": program.items,
        "unit": program.unit,
        "memory": {**dataclasses.asdict(memory), "total": memory.total, "hbm": hbm},
        "flops": cost.flops,
        "flops_loops_once": once.flops,
        "bytes_accessed": cost.bytes_accessed,
        "collectives": [dataclasses.asdict(c) for c in cost.collectives],
        "roofline_seconds": dataclasses.asdict(bounds),
        "bound": bounds.bound,
        "items_per_second": program.items / bounds.seconds,
        "compile_seconds": round(seconds, 1),
        "batch": dataclasses.asdict(config.batch)[args.job],
    }
    fits = memory.total <= HBM_SHARE * hbm
    message = f"{args.tpu_config}: {args.job} needs {memory.total / GIB:.2f} GiB of {hbm / GIB:.1f} GiB HBM a device"
    if not fits:
        raise ValueError(f"{message}; lower {program.knob}")
    return result


def compile_job(args: Arguments) -> tuple[dict[str, Any], bool]:
    """The result of one job, from its file if that is of the same program; and whether it was compiled now."""
    config = TpuConfig.from_file(args.tpu_config)
    jobs = Jobs(config, config.make_mesh(), args.model_config, args.steps, args.guidance)
    program = jobs.make(args.job)
    lowered = program.lower()
    path = args.output / f"{args.tpu_config.stem}-{args.job}-{args.model_config}.json"
    same = identity(args, config, lowered)
    if path.is_file() and (found := read_json(path)).get("identity") == same:
        return found, False
    result = {"identity": same, **measure(args, config, program, lowered)}
    write_json(path, result)
    return result, True


def show(result: dict[str, Any]) -> None:
    """The result as a table on the terminal."""
    table = Table("per device", "", title=f"{result['job']}, {result['model']}, {result['topology']}", show_header=True)
    memory, bounds = result["memory"], result["roofline_seconds"]
    for name in ("arguments", "outputs", "aliased", "temporaries", "code", "total", "hbm"):
        table.add_row(f"memory: {name}", f"{memory[name] / GIB:.3f} GiB")
    table.add_row(
        "operations", f"{result['flops'] / 1e12:.3f} TFLOP ({result['flops_loops_once'] / 1e12:.3f} loops once)"
    )
    table.add_row("bytes accessed", f"{result['bytes_accessed'] / 1e9:.2f} GB")
    for c in result["collectives"] or [{"kind": "collectives", "count": 0, "bytes": 0}]:
        table.add_row(c["kind"], f"{c['count']}, {c['bytes'] / 1e6:.2f} MB")
    for name, seconds in bounds.items():
        table.add_row(f"roofline: {name}", f"{1e3 * seconds:.3f} ms")
    table.add_row(f"at most, all {result['devices']} devices", f"{result['items_per_second']:.4g} {result['unit']}/s")
    table.add_row("compiled in", f"{result['compile_seconds']} s")
    console().print(table)


def run(args: Arguments) -> list[dict[str, Any]]:
    """Compile what is asked for; returns the results."""
    require(args.job in JOBS, "--job", args.job, f"one of {JOBS}")
    require(args.model_config in MODELS, "--model-config", args.model_config, f"one of {MODELS}")
    require_positive_integers(args, "arguments", ("steps",))
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", False)
    results, started = [], time.monotonic()
    chosen = plan(args.tpu_config.parent) if args.all else [(args.tpu_config, args.job, args.model_config)]
    for path, job, model in chosen:
        if args.stop_after_minutes and time.monotonic() - started > 60 * args.stop_after_minutes:
            print(f"stopped after {args.stop_after_minutes} minutes, {len(results)} of {len(chosen)} done")
            break
        one = dataclasses.replace(args, tpu_config=path, job=job, model_config=model)
        try:
            result, fresh = compile_job(one)
        except ValueError as error:
            if not args.all:
                raise
            print(f"left out: {error}")
            continue
        results.append(result)
        if fresh or not args.all:
            show(result)
        jax.clear_caches()
        gc.collect()
    if args.table is not None:
        aot_tables.write(args.output, args.table)
    return results


def main() -> None:
    # Neither a TPU nor Google Cloud's metadata server is needed to compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu's own threads have stacks that products fused three deep, as in attention at 64x64, overflow.
    os.environ.setdefault("LIBTPU_INIT_ARGS", f"--fibers_default_thread_stack_size={STACK_BYTES}")
    jax.config.update("jax_platforms", "cpu")
    command("eval.aot", lambda: run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    main()
