"""Benchmark of a whole image, from token ids to pixels in guided steps, next to diffusers in PyTorch and old Flax."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval.aot_jobs import model_configs
from eval.peers import flax_diffusers, torch_image
from eval.peers.lines import Served
from eval.stages import image_process
from eval.stages.codec import EAGER, compiler_problem, peer

GIB = 2**30
COLUMNS = [
    "implementation",
    "seconds an image",
    "of eager PyTorch",
    "peak memory (GiB)",
    "compilation (s)",
    "from the cache (s)",
]
OLD_FLAX = "flax_diffusers"
MEGJAX, COMPILED, FLAX = "megjax", "PyTorch, torch.compile", "Flax of diffusers 0.39"


def run(
    model: str,
    batches: tuple[int, ...],
    steps: int,
    rounds: int,
    with_peers: bool,
    compiled: bool = True,
    guidance: float = 7.5,
) -> tuple[list[dict], list[str], list[str]]:
    """Rows of the benchmark file, the peers that are missing, and notes; `batches` are images at a time.

    Every sample is a call in a new process, one after the other, so that its memory can be seen and that several copies
    of the weights need not fit side by side. Weights are random. Numbers are float32 on a CPU and bfloat16 elsewhere.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    configs, length = model_configs(model, dtype)
    request = {"model": model, "steps": steps, "guidance": guidance, "dtype": jnp.dtype(dtype).name}
    request |= {"length": length, "device": "cpu" if on_cpu else "cuda"}
    networks = {name: getattr(configs, name).to_dict() for name in ("text_encoder", "unet", "vae")}
    starts: dict[str, Callable[..., Served]] = {MEGJAX: image_process.start}
    asked: dict[str, dict[str, Any]] = {MEGJAX: {}}
    notes, missing = [f"{model}: random weights, {jnp.dtype(dtype).name}, DDIM, guidance {guidance:g}."], []
    if with_peers:
        if peer("torch_unet") is None:
            missing.append("torch_image")
        else:
            starts[EAGER], asked[EAGER] = torch_image.start, {**networks, "compiled": False}
            problem = compiler_problem(on_cpu) if compiled else "not asked for"
            if problem:
                notes.append(f"torch.compile was not measured: {problem}.")
            else:
                starts[COMPILED], asked[COMPILED] = torch_image.start, {**networks, "compiled": True}
        if flax_diffusers.PYTHON.exists():
            starts[FLAX], asked[FLAX] = flax_diffusers.start, networks
        else:
            missing.append(OLD_FLAX)
    pixels = configs.unet.sample_size * configs.vae.downsample
    case, rows, versions = f"image of {model}, {pixels}x{pixels} pixels, {steps} guided steps", [], set()
    for batch in batches:
        of_batch = {name: partial(start, {**request, **asked[name], "batch": batch}) for name, start in starts.items()}
        samples, problems = measure(of_batch, rounds)
        rows += rows_of(samples, case, batch, rounds)
        notes += problems
        versions |= {sample["versions"] for made in samples.values() for sample in made if "versions" in sample}
    return rows, missing, [*notes, *(f"{version}." for version in sorted(versions))]


def measure(starts: dict[str, Callable[..., Served]], rounds: int) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Samples of every implementation, A B C A B C ..., each with what its process said of itself; and problems.

    Compiled programs are kept from one process to the next; a first process of each only starts, to compile.
    """
    samples, problems = {name: [] for name in starts}, []
    with tempfile.TemporaryDirectory() as cache, tqdm(total=len(starts) * (rounds + 1), leave=False) as bar:
        environ = {"JAX_COMPILATION_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        for i in range(rounds + 1):
            for name in list(samples):
                bar.set_description(name)
                try:
                    served = starts[name](environ=environ)
                    samples[name].append({**served.about, **(served() if i > 0 else {})})
                    served.close()
                except RuntimeError as error:
                    problems.append(f"{name} was not measured: {error}.")
                    del samples[name]
                bar.update()
    return samples, problems


def rows_of(samples: dict[str, list[dict[str, Any]]], case: str, batch: int, rounds: int) -> list[dict]:
    """One row for each implementation."""
    seconds = {name: [x["seconds"] for x in made if "seconds" in x] for name, made in samples.items()}
    rows = []
    for name, made in samples.items():
        median = statistics.median(seconds[name])
        starts = [x.get("compile_s", x.get("warm_up_s")) for x in made]
        rows.append(
            {
                "case": case,
                "batch": batch,
                "implementation": name,
                "seconds": median / batch,
                "seconds_range": [min(seconds[name]) / batch, max(seconds[name]) / batch],
                "ratio_to_eager": statistics.median(seconds[EAGER]) / median if EAGER in seconds else None,
                "peak_bytes": max(x["peak_bytes"] for x in made if "seconds" in x),
                "temporary_bytes": made[0].get("temporary_bytes"),
                "compilation_s": starts[0],
                "cached_s": starts[-1],
                "rounds": rounds,
            }
        )
    return rows


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_range
    ratio = row.ratio_to_eager
    spread = f" [{low:.4g}, {high:.4g}]" if row.rounds > 1 else ""
    return [
        row.implementation,
        f"{row.seconds:.4g}{spread}",
        "-" if ratio is None or np.isnan(ratio) else f"{ratio:.2f}",
        f"{row.peak_bytes / GIB:.2f}",
        f"{row.compilation_s:.1f}",
        f"{row.cached_s:.1f}",
    ]
