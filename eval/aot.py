"""Compile a job for a TPU topology on a machine without one: memory, operations, collectives and roofline time."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import Mesh
from rich.table import Table

from eval import aot_tables
from eval.aot_jobs import JOBS, MODELS, Jobs, Program
from eval.measure import console
from megjax import hlo
from megjax.configs import read_json, require, require_positive_integers, write_json
from megjax.cost import cost_of_compiled, roofline
from megjax.runtime import command
from megjax.sharding import AXES, mesh_of
from megjax.tpu import TpuConfig

GIB = 2**30
STACK_BYTES = 4 * 2**20
NUM_CAUSES = 5
"""The largest movers of bytes that a result names."""
HBM_SHARE = 0.97
"""Share of the HBM that a program may take: the rest is the runtime's."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.aot`: jobs to compile, and the TPU topology to compile them for."""

    tpu_config: Path = Path("tpu_configs/v5e-8.json")
    """A file of tpu_configs/."""
    job: str = "generate"
    """generate, sweep, codec, power or ldm; or latency: one image by several devices."""
    model_config: str = "sd15"
    """sd15, sd21 or scenes: sizes only, no weights."""
    steps: int = 25
    """Denoising steps of `generate`."""
    guidance: float = 7.5
    """Classifier-free guidance scale of `generate`; 1 turns it off."""
    latency_mesh: tuple[int, int] = (2, 4)
    """Devices of `latency`: those that split the guided pair of latents, times those that split layers."""
    effort: float = -1.0
    """How hard XLA works on a fast program, -1 to 1: -1 compiles several times faster, 0 is what runs use."""
    all: bool = False
    """Compile the whole list of jobs and topologies of docs/tpu.md instead, what is there already left out."""
    stop_after_minutes: float = 0.0
    """With --all: begin no compilation after so many minutes; 0 is no limit."""
    output: Path = Path("benchmarks/aot")
    """Folder of the results, one JSON file a job."""
    table: Path | None = None
    """Also write the tables of all results there."""


PASSED = ("tpu_config", "job", "model_config", "steps", "guidance", "latency_mesh", "effort", "output")
LATENCY_MESHES = ((1, 1), (2, 1), (1, 4), (2, 2), (2, 4))


def plan(args: Arguments) -> list[Arguments]:
    """The whole list: Stable Diffusion 1.5 and the bundled model, every job on every topology of the folder."""
    folder = args.tpu_config.parent
    first = folder / "v5e-8.json"
    files = sorted(folder.glob("*.json"), key=lambda path: (path != first, path.stem))
    listed = [(path, job, "scenes") for path in files for job in ("codec", "power")]
    listed += [(path, job, "sd15") for path in files for job in ("generate", "sweep", "codec", "ldm")]
    listed += [(path, job, "scenes") for path in files for job in ("sweep", "generate", "ldm")]
    listed += [(first, "generate", "sd21")]
    chosen = [dataclasses.replace(args, tpu_config=path, job=job, model_config=model) for path, job, model in listed]
    one = dataclasses.replace(args, tpu_config=first, job="latency", model_config="sd15")
    return chosen + [dataclasses.replace(one, latency_mesh=mesh) for mesh in LATENCY_MESHES]


def identity(args: Arguments, config: TpuConfig, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Identity of a compilation: the program, the flags, the versions of the compiler and of the accounting."""
    return {
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "flags": list(config.xla_flags),
        "accounting": aot_tables.ACCOUNTING,
        "effort": args.effort,
        "jax": jax.__version__,
        "libtpu": metadata.version("libtpu"),
    }


def latency_mesh(args: Arguments, config: TpuConfig) -> Mesh:
    """The first devices of the topology as a mesh for `latency`; ValueError if they are not so many."""
    data, tensor = args.latency_mesh
    devices = config.devices()
    require(1 <= data * tensor <= len(devices), "--latency-mesh", args.latency_mesh, f"at most {len(devices)} devices")
    return mesh_of(devices[: data * tensor], dict(zip(AXES, (data, 1, tensor), strict=True)))


def measure(
    args: Arguments, config: TpuConfig, program: Program, lowered: jax.stages.Lowered, mesh: Mesh
) -> dict[str, Any]:
    """Compile and account; ValueError if it does not fit the chip."""
    started = time.monotonic()
    try:
        options = {**config.compiler_options, "exec_time_optimization_effort": args.effort}
        compiled = lowered.compile(compiler_options=options)
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
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "items": program.items,
        "unit": program.unit,
        "memory": {**dataclasses.asdict(memory), "total": memory.total, "hbm": hbm},
        "flops": cost.flops,
        "flops_loops_once": once.flops,
        "bytes_accessed": cost.bytes_accessed,
        "causes": dict([*hlo.Module(compiled.as_text()).causes().items()][:NUM_CAUSES]),
        "collectives": [dataclasses.asdict(c) for c in cost.collectives],
        "roofline_seconds": dataclasses.asdict(bounds),
        "bound": bounds.bound,
        "items_per_second": program.items / bounds.seconds,
        "compile_seconds": round(seconds, 1),
        "batch": dataclasses.asdict(config.batch).get(args.job, 1),
    }
    fits = memory.total <= HBM_SHARE * hbm
    message = f"{args.tpu_config}: {args.job} needs {memory.total / GIB:.2f} GiB of {hbm / GIB:.1f} GiB HBM a device"
    if not fits:
        raise ValueError(f"{message}; lower {program.knob}")
    return result


def compile_job(args: Arguments) -> dict[str, Any]:
    """The result of one job, from its file if that is of the same program."""
    config = TpuConfig.from_file(args.tpu_config)
    mesh = latency_mesh(args, config) if args.job == "latency" else config.make_mesh()
    program = Jobs(config, mesh, args.model_config, args.steps, args.guidance).make(args.job)
    lowered = program.lower()
    effort = "" if args.effort == -1 else f"-effort{args.effort:g}"
    shape = "-{}x{}".format(*args.latency_mesh) if args.job == "latency" else ""
    path = args.output / f"{args.tpu_config.stem}-{args.job}-{args.model_config}{shape}{effort}.json"
    same = identity(args, config, lowered)
    if path.is_file() and (found := read_json(path)).get("identity") == same:
        return found
    result = {"identity": same, **measure(args, config, program, lowered, mesh)}
    write_json(path, result)
    return result


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
    for name, size in aot_tables.causes(result):
        table.add_row(f"  {name}", f"{size / 1e9:.2f} GB")
    for c in result["collectives"] or [{"kind": "collectives", "count": 0, "bytes": 0}]:
        table.add_row(c["kind"], f"{c['count']}, {c['bytes'] / 1e6:.2f} MB")
    for name, seconds in bounds.items():
        table.add_row(f"roofline: {name}", f"{1e3 * seconds:.3f} ms")
    table.add_row(f"at most, all {result['devices']} devices", f"{result['items_per_second']:.4g} {result['unit']}/s")
    table.add_row("compiled in", f"{result['compile_seconds']} s")
    console().print(table)


def compile_all(args: Arguments) -> None:
    """The whole list, each job in a process of its own: libtpu may end the process on a program that it cannot do."""
    chosen, started, failed = plan(args), time.monotonic(), []
    for i, one in enumerate(chosen):
        if args.stop_after_minutes and time.monotonic() - started > 60 * args.stop_after_minutes:
            print(f"stopped after {args.stop_after_minutes} minutes, {i} of {len(chosen)} done")
            break
        name = f"{one.job}, {one.model_config}, {one.tpu_config.stem}"
        print(f"{i + 1} of {len(chosen)}: {name}", flush=True)
        options = dataclasses.asdict(one).items()
        words = [(f"--{key.replace('_', '-')}", value) for key, value in options if key in PASSED]
        flat = [str(x) for key, value in words for x in (key, *(value if isinstance(value, tuple) else (value,)))]
        if subprocess.run([sys.executable, "-m", "eval.aot", *flat]).returncode:
            failed.append(name)
    print("\n".join(f"left out: {name}" for name in failed))


def run(args: Arguments) -> list[dict[str, Any]]:
    """Compile what is asked for; returns the results."""
    require(args.job in JOBS, "--job", args.job, f"one of {JOBS}")
    require(args.model_config in MODELS, "--model-config", args.model_config, f"one of {MODELS}")
    require_positive_integers(args, "arguments", ("steps", "latency_mesh"))
    require(-1 <= args.effort <= 1, "--effort", args.effort, "in [-1, 1]")
    args.output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", False)
    results = [] if args.all else [compile_job(args)]
    for result in results:
        show(result)
    if args.all:
        compile_all(args)
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
