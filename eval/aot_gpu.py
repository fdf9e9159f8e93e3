"""Compile the jobs of `eval.aot` for one NVIDIA H200 on a machine without a GPU: memory, and what moves the bytes.

XLA's compiler for CUDA, which `make aot-gpu` puts beside the environment, needs no GPU where it times nothing. Kernels
are then chosen untimed; a program for which its own matrix products fail that way leaves all of them to cuBLAS.
"""

import dataclasses
import gc
import importlib.util
import os
import sys
from pathlib import Path

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh

from eval import aot_tables
from eval.aot import NUM_CAUSES
from eval.aot_jobs import Jobs
from megjax import hlo
from megjax.configs import read_json, require, write_json
from megjax.cost import find_chip
from megjax.runtime import command
from megjax.sharding import AXES, mesh_of
from megjax.tpu import TpuConfig

JOBS = ("power-scenes", "codec-sd15", "sweep-sd15", "generate-sd15", "ldm-sd15")
BATCHES = {"generate": 16, "decode": 8, "sweep": 128, "ldm": 16}
PLUGIN = "jax_plugins/xla_cuda12/xla_cuda_plugin.so"
UNTIMED = {"xla_gpu_autotune_level": 0}
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""The numbers of xla/backends/gpu/target_config/specs/h200.txtpb in OpenXLA's repository."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `eval.aot_gpu`: jobs to compile; those that the file of results has already are left out."""

    jobs: tuple[str, ...] = JOBS
    """Jobs and models, such as generate-sd15."""
    output: Path = Path("benchmarks/aot")
    """Folder of `eval.aot`'s results, to which these are added in one file."""
    table: Path | None = None
    """Also write the tables of `eval.aot` there, these results among them."""


def find_plugin() -> Path:
    """XLA's compiler for CUDA, beside the environment or installed in it; ValueError where it is missing."""
    folders = [Path(sys.prefix) / "cuda"]
    if spec := importlib.util.find_spec("jax_plugins"):
        folders += [Path(path).parent for path in spec.submodule_search_locations]
    found = [folder / PLUGIN for folder in folders if (folder / PLUGIN).is_file()]
    if not found:
        raise ValueError("XLA's compiler for CUDA is not installed; `make aot-gpu` or pip install jax-cuda12-pjrt")
    return found[0]


def gpu_mesh() -> Mesh:
    """A mesh of one H200 to compile for."""
    os.environ["PJRT_NAMES_AND_LIBRARY_PATHS"] = f"cuda:{find_plugin()}"
    described = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=H200)
    return mesh_of(described.devices[:1], dict.fromkeys(AXES, 1))


def compile_job(name: str, mesh: Mesh) -> dict:
    """Memory and bytes of one job, in bfloat16 as on TPUs."""
    job, _, model = name.partition("-")
    config = TpuConfig.from_file("tpu_configs/v5e-8.json")
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, **BATCHES))
    program = Jobs(config, mesh, model).make(job)
    lowered, products = program.lower(), "XLA"
    try:
        compiled = lowered.compile(compiler_options=UNTIMED)
    except jax.errors.JaxRuntimeError:
        compiled, products = lowered.compile(compiler_options=UNTIMED | CUBLAS), "cuBLAS"
    module, stats = hlo.Module(compiled.as_text()), compiled.memory_analysis()
    moved = module.work(repeat=True).bytes
    return {
        "job": job,
        "model": model,
        "items": program.items,
        "unit": program.unit,
        "products": products,
        "temporaries": stats.temp_size_in_bytes,
        "bytes_accessed": moved,
        "memory_seconds": moved / find_chip("h200").hbm_bandwidth,
        "causes": dict([*module.causes().items()][:NUM_CAUSES]),
        "jax": jax.__version__,
    }


def run(args: Arguments) -> dict[str, dict]:
    """Compile what is missing and write it down job by job; returns all results."""
    for name in args.jobs:
        require(name in JOBS, "--jobs", name, f"of {JOBS}")
    path = args.output / aot_tables.GPU
    found = read_json(path) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in args.jobs if name not in found]
    mesh = gpu_mesh() if missing else None
    for name in missing:
        found[name] = compile_job(name, mesh)
        write_json(path, found)
        result = found[name]
        print(f"{name}: {result['bytes_accessed'] / 1e9:.3g} GB, {result['temporaries'] / 2**30:.2f} GiB", flush=True)
        gc.collect()
    if args.table is not None:
        aot_tables.write(args.output, args.table)
    return found


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command("eval.aot_gpu", lambda: run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    main()
