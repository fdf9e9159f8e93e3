"""Tables of what `eval.aot` found, as Markdown."""

from pathlib import Path
from typing import Any

from megjax.configs import read_json, write_text

GIB = 2**30
JOB_ORDER = ("generate", "ldm", "sweep", "codec", "power")
TEXT = """# TPU: programs compiled ahead of time

Written by `make aot`. Nothing here was run on a TPU: every program was compiled by libtpu for the topology on a machine
without one, from shapes alone, and XLA's analysis of the compiled program was read.

- Memory is per device, as the compiler lays it out; the last column is what share of the HBM it takes.
- Operations and bytes are per device and call. XLA counts the body of a loop once; the other passes are added from the
  text of the compiled program. XLA's bytes include those that stay in on-chip memory, so the memory bound is high for
  small programs.
- "Sent" is what a device sends in ring collectives.
- The time is the largest of operations, bytes and bytes sent over the chip's public peaks: **a bound that nothing
  beats, not a prediction**.
- Batches are those of the files in [tpu_configs](../tpu_configs/README.md); `generate` makes 512x512 images (64x64 with
  the bundled model) in 25 guided steps from token ids to pixels, `ldm`, `codec` and `power` are one training step,
  `sweep` takes latents through codec, Rayleigh fading and decoders at a rate of 4.
"""
HEADER = (
    "| job | model | topology | per call | arguments | temporaries | code | HBM | TFLOP | GB | sent "
    "| bound | time | at most |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |\n"
)


def write(folder: Path, path: Path) -> None:
    """Write the tables of all results in `folder` to `path`."""
    results = sorted((read_json(file) for file in folder.glob("*.json")), key=_order)
    versions = sorted({f"JAX {r['identity']['jax']} and libtpu {r['identity']['libtpu']}" for r in results})
    body = TEXT + f"\nCompiled with {', '.join(versions)}.\n\n" + HEADER + "".join(map(row, results))
    body += "\nCollectives, per device and call:\n\n| job | model | topology | kind | number | MB |\n"
    body += "| --- | --- | --- | --- | ---: | ---: |\n"
    for r in results:
        for c in r["collectives"]:
            kind = f"| {r['job']} | {r['model']} | {r['topology']} | {c['kind']} |"
            body += f"{kind} {c['count']} | {c['bytes'] / 1e6:,.1f} |\n"
    write_text(path, body + weak_scaling(results))


def weak_scaling(results: list[dict[str, Any]]) -> str:
    """The same job and batch per device on more and more chips of a kind, where there are several such results."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["job"], r["model"], r["topology"].split(":")[0], r["batch"]), []).append(r)
    lines = []
    for (job, model, chip, _), group in groups.items():
        group = sorted(group, key=lambda r: r["devices"])
        if len(group) < 2:
            continue
        for r in group:
            sent = sum(c["sent"] for c in r["collectives"])
            first, time = (max(x["roofline_seconds"].values()) for x in (group[0], r))
            efficiency = f"{first / time:.0%}"
            cells = (job, model, chip, str(r["devices"]), f"{sent / 1e6:,.3g} MB", f"{1e3 * time:.3g} ms", efficiency)
            lines.append("| " + " | ".join(cells) + " |\n")
    if not lines:
        return ""
    head = (
        "\nWeak scaling: the batch of a device stays, the number of devices grows. The last column is the time bound\n"
    )
    head += "with the fewest devices over that with these; latency of collectives is not in it.\n\n"
    head += "| job | model | chip | devices | sent by a device | time | efficiency |\n"
    return head + "| --- | --- | --- | ---: | ---: | ---: | ---: |\n" + "".join(lines)


def row(r: dict[str, Any]) -> str:
    """One line of the table."""
    memory, seconds = r["memory"], max(r["roofline_seconds"].values())
    sent = sum(c["sent"] for c in r["collectives"])
    cells = (
        r["job"],
        r["model"],
        r["topology"],
        f"{r['items']:,} {r['unit']}",
        f"{memory['arguments'] / GIB:.2f} GiB",
        f"{memory['temporaries'] / GIB:.2f} GiB",
        f"{memory['code'] / 2**20:.0f} MiB",
        f"{memory['total'] / memory['hbm']:.0%}",
        f"{r['flops'] / 1e12:.3g}",
        f"{r['bytes_accessed'] / 1e9:.3g}",
        f"{sent / 1e6:.3g} MB" if sent else "0",
        r["bound"],
        f"{1e3 * seconds:.3g} ms",
        f"{r['items_per_second']:,.4g} / s",
    )
    return "| " + " | ".join(cells) + " |\n"


def _order(r: dict[str, Any]) -> tuple:
    return JOB_ORDER.index(r["job"]), r["model"] == "scenes", r["model"], r["topology"].split(":")[0], r["devices"]
