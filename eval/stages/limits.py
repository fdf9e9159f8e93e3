"""What every stage's program reaches of the machine's ceilings: operations and bytes a second."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from eval.peers.lines import serve
from eval.stages import STAGES, Measured, Stage, profile
from megjax import hlo

COLUMNS = ["stage", "seconds a call", "GFLOP a call", "TFLOP/s", "of matmul", "GB a call", "GB/s", "of copy"]
SAMPLES = 5


def run(limits: dict[str, float], stages: tuple[str, ...] = profile.PROGRAMS) -> Measured:
    """Rows of the benchmark file next to the machine's `limits` (`eval.measure.ceilings`), no missing peers, and notes.

    Each stage runs in a process of its own.
    """
    rows, notes = [], []
    for stage in stages:
        try:
            about = profile.of_process("eval.stages.limits", stage)
        except RuntimeError as error:
            notes.append(f"{stage} was not measured: {error}.")
            continue
        flops, moved = (about[name] / about["seconds"] for name in ("flops", "bytes"))
        row = {"case": "programs of the stages", "batch": 0, "implementation": stage, **about}
        row |= {"flops_per_second": flops, "share_of_matmul": flops / limits["matmul_float32"]}
        rows.append({**row, "bytes_per_second": moved, "share_of_copy": moved / limits["copy_bytes"]})
    notes.append(
        "Operations and bytes are those of the compiled programs, loops repeated; transcendental functions are no "
        "operations to XLA. Bytes are those between XLA's operations: what stays in the caches counts too, so that a "
        "program can pass the copy of an array that does not fit there."
    )
    return rows, [], notes


def cells(row) -> list[str]:
    """One line of the table."""
    return [
        row.implementation,
        f"{row.seconds:.3g}",
        f"{row.flops / 1e9:,.3g}",
        f"{row.flops_per_second / 1e12:.3f}",
        f"{100 * row.share_of_matmul:.0f} %",
        f"{row.bytes / 1e9:,.3g}",
        f"{row.bytes_per_second / 1e9:.1f}",
        f"{100 * row.share_of_copy:.0f} %",
    ]


def work_of(call: Callable[[], Any], dump: str) -> hlo.Work:
    """Operations and bytes of all programs that a call runs; XLA's modules are in `dump`.

    RuntimeError if one is not there.
    """
    events, total = profile.traced(call), hlo.Work()
    for name in {module for module, _ in events}:
        text = profile.text_of(name, dump)
        module = hlo.Module(text)
        entry = module.computations.get(module.entry, ())
        runs = min((len(events[name, i.name]) for i in entry if (name, i.name) in events), default=0)
        if not text or not runs:
            raise RuntimeError(f"program {name} ran, but its text is not there")
        total = total + module.work(repeat=True) * runs
    return total


def _make(request: dict[str, Any]):
    call, samples = profile.program(request["stage"]), []
    call()
    for _ in range(SAMPLES):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    work = work_of(call, request["dump"])
    return {"seconds": statistics.median(samples), "flops": work.flops, "bytes": work.bytes}, call, None


STAGES.register(
    Stage(
        name="limits",
        title="operations and bytes a second next to the machine's",
        version=1,
        rank=110,
        run=lambda args, ceilings: run(ceilings),
        columns=COLUMNS,
        cells=cells,
        needs_ceilings=True,
    )
)


if __name__ == "__main__":
    serve(_make)
