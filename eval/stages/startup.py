"""How long a new process takes to its first image of the bundled model, with and without programs kept on disk."""

import statistics
import sys
import tempfile
import time
from typing import Any

from tqdm import tqdm

from eval.markdown import interval
from eval.peers.lines import Served
from eval.stages import STAGES, Measured, Stage
from eval.startup_process import PARTS

EMPTY, WARM = "nothing kept", "programs kept on disk"
COLUMNS = ["start", "to the first image (s)", "imports (s)", "weights (s)", "first image (s)", "next image (ms)"]


def run(rounds: int) -> Measured:
    """Rows of the benchmark file, no missing peers, no notes; every sample is a process of its own."""
    samples: dict[str, list[dict[str, Any]]] = {EMPTY: [], WARM: []}
    for _ in tqdm(range(rounds), leave=False, desc="start-up"):
        with tempfile.TemporaryDirectory() as cache:
            for name in samples:  # the second finds what the first kept
                started = time.perf_counter()
                served = Served(
                    [sys.executable, "-m", "eval.startup_process"], {}, {"JAX_COMPILATION_CACHE_DIR": cache}
                )
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
    return [row.implementation, interval(row.seconds, low, high, ".2f"), *parts, f"{1e3 * row.next_image_s:.0f}"]


STAGES.register(
    Stage(
        name="startup",
        title="a new process to its first image",
        version=1,
        rank=100,
        run=lambda args, _: run(args.rounds),
        columns=COLUMNS,
        cells=cells,
    )
)
