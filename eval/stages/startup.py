"""How long a new process takes to its first image of the bundled model, with and without programs kept on disk."""

import statistics
import sys
import tempfile
import time
from typing import Any

from tqdm import tqdm

from eval.peers.lines import Served, serve

EMPTY, WARM = "nothing kept", "programs kept on disk"
PARTS = ("imports_s", "weights_s", "first_image_s", "next_image_s")
COLUMNS = ["start", "to the first image (s)", "imports (s)", "weights (s)", "first image (s)", "next image (ms)"]


def run(rounds: int) -> tuple[list[dict], list[str], list[str]]:
    """Rows of the benchmark file, no missing peers, no notes; every sample is a process of its own."""
    samples: dict[str, list[dict[str, Any]]] = {EMPTY: [], WARM: []}
    for _ in tqdm(range(rounds), leave=False, desc="start-up"):
        with tempfile.TemporaryDirectory() as cache:
            for name in samples:  # the second finds what the first kept
                started = time.perf_counter()
                served = Served([sys.executable, "-m", "eval.stages.startup"], {}, {"JAX_COMPILATION_CACHE_DIR": cache})
                seconds = time.perf_counter() - started - served.about["next_image_s"]
                samples[name].append({"seconds": seconds, **served.about})
                served.close()
    return [_row(name, made) for name, made in samples.items()], [], []


def _row(name: str, made: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in made]
    row = {"case": "bundled model, 64x64, 25 guided steps", "batch": 1, "implementation": name, "rounds": len(made)}
    row |= {"seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)]}
    return row | {part: statistics.median(sample[part] for sample in made) for part in PARTS}


def cells(row) -> list[str]:
    """One line of the table."""
    low, high = row.seconds_range
    parts = [f"{row.imports_s:.2f}", f"{row.weights_s:.2f}", f"{row.first_image_s:.2f}"]
    return [row.implementation, f"{row.seconds:.2f} [{low:.2f}, {high:.2f}]", *parts, f"{1e3 * row.next_image_s:.0f}"]


def _make(request: dict[str, Any]):
    started = time.perf_counter()
    import jax

    from megjax.diffusion.pipeline import StableDiffusion
    from megjax.runtime import enable_compilation_cache

    enable_compilation_cache()
    times = [started, time.perf_counter()]
    pipe = StableDiffusion.from_pretrained("scenes")
    times.append(time.perf_counter())
    ids = pipe.tokenize(["a red house under a night sky"])
    for i in range(2):
        jax.block_until_ready(pipe.generate(jax.random.key(i), ids))
        times.append(time.perf_counter())
    parts = (later - earlier for earlier, later in zip(times, times[1:], strict=False))
    return dict(zip(PARTS, parts, strict=True)), lambda: None, None


if __name__ == "__main__":
    serve(_make)
