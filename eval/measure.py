"""Timing of interleaved contenders, and what a benchmark file says about where it was made."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PACKAGES = ("megjax", "jax", "jaxlib", "numpy", "torch", "diffusers", "sionna-no-rt", "sionna")
MIN_SAMPLE_S = 0.2
"""One sample repeats a call until this much time is expected to pass."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of a case: `call` does the whole work once and returns when it is done."""

    name: str
    call: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender."""

    first_s: float
    """The first call: tracing, compilation and one execution."""
    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        low, _, high = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return low, high


def measure(contenders: list[Contender], rounds: int, title: str) -> dict[str, Timing]:
    """Time the contenders in turn, A B C A B C ..., so that whatever slows the machine down slows all of them.

    Each is called once (the first call), once more to warm up, and then `rounds` times for a sample of calls.
    """
    first, repeats = {}, {}
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with tqdm(total=len(contenders) * (rounds + 1), desc=title, leave=False, disable=None) as bar:
        for contender in contenders:
            first[contender.name] = _seconds(contender.call, 1)
            again = _seconds(contender.call, 1)
            repeats[contender.name] = max(1, round(MIN_SAMPLE_S / again))
            bar.update()
        for _ in range(rounds):
            for contender in contenders:
                samples[contender.name].append(_seconds(contender.call, repeats[contender.name]))
                bar.update()
    return {name: Timing(first[name], tuple(samples[name])) for name in samples}


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def environment() -> dict[str, Any]:
    """Device, versions and commit, for the head of a benchmark file."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "cpu_cores": num_cores(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
    }


def matmul_side() -> int:
    """Side of the square matrices whose product is a device's ceiling: large enough to fill it."""
    return 4_096 if jax.default_backend() == "cpu" else 8_192


def matmul(dtype: Any, side: int) -> Callable[[], jax.Array]:
    """A product of square matrices of normal numbers, as a GPU multiplies zeros and ones faster."""
    x, product = jax.random.normal(jax.random.key(0), (side, side), dtype), jax.jit(lambda a: a @ a)
    return lambda: jax.block_until_ready(product(x))


def prepare_torch() -> str | None:
    """PyTorch's name for the kind of device that JAX has; None where PyTorch cannot use it.

    From then on it multiplies float32 matrices in TF32 on a GPU, which is XLA's default there.
    """
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    torch.set_float32_matmul_precision("high")
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def ceilings(rounds: int = 3, side: int | None = None, copied: int = 2**28) -> dict[str, float]:
    """Peaks that the device reaches in practice: operations/s of square matrix products, and bytes/s of a copy.

    A copy of `copied` bytes reads and writes each of them once, and counts them twice.
    """
    side = side or matmul_side()
    kinds = jnp.float32, jnp.bfloat16
    contenders = [Contender(f"matmul_{jnp.dtype(dtype).name}", matmul(dtype, side)) for dtype in kinds]
    source, copy = jnp.ones(copied // 4, jnp.float32), jax.jit(jnp.copy)
    contenders.append(Contender("copy_bytes", lambda: jax.block_until_ready(copy(source))))
    work = [2 * side**3, 2 * side**3, 2 * copied]
    timings = measure(contenders, rounds, "ceilings")
    return {name: amount / timing.median_s for amount, (name, timing) in zip(work, timings.items(), strict=True)}


def console() -> Console:
    """For tables: as wide as the terminal; 140 columns where the output goes to a file or a pipe."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> Mapping[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _commit() -> str:
    """The commit of the checkout, with "+changes" when tracked files differ from it; "unknown" outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
