"""Tables of what `eval.aot` found, as Markdown."""

from pathlib import Path
from typing import Any

from eval.markdown import table
from megjax.configs import read_json
from megjax.files import write_text

GIB = 2**30
JOB_ORDER = ("generate", "latency", "ldm", "sweep", "codec", "power")
MODEL_NAMES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "scenes": "The bundled model"}
TEXT = """# TPU: programs compiled ahead of time

Written by `make aot`. Nothing here was run on a TPU: every program was compiled by libtpu for the topology on a machine
without one, from shapes alone, and XLA's analysis of the compiled program was read.

- Memory is per device, as the compiler lays it out; the last column is what share of the HBM it takes.
- Operations and bytes are per device and call, loops counted as often as they run. Bytes are those that instructions
  read from and write to HBM, counted from the text of the compiled program; what the compiler keeps in the chip's own
  memory does not count. Attention's kernels count with the operations that they state, or with their matrix products,
  and with their operands and results once.
- "Sent" is what a device sends in ring collectives.
- The time is the largest of operations, bytes and bytes sent over the chip's public peaks: **a bound that the compiled
  program cannot beat, not a prediction**.
- Compiled with XLA's least effort for fast programs (`--effort -1`), which takes a fraction of the time, but keeps
  hardly anything in the chip's own memory; what XLA's own effort makes of the same jobs, where that was tried, has a
  table of its own.
- Batches are those of the files in [tpu_configs](../tpu_configs/README.md), and so is the number of images that are
  decoded at once. `generate` makes 512x512 images (64x64 with the bundled model, as many more; 768x768 with Stable
  Diffusion 2.1, a quarter as many) in 25 guided steps from token ids to pixels; `ldm`, `codec` and `power` are one
  training step; `sweep` takes latents through codec, Rayleigh fading and decoders at a rate of 4.
"""
ACCOUNTING = 4
"""Version of how operations and bytes are counted (`megjax.hlo`); results of another are made again."""
BEFORE, GPU = "other/before.json", "other/gpu.json"
"""Files, in the folder of results, with those of an earlier version and those of `eval.aot_gpu`."""
COLUMNS = ("job", "model", "topology", "per call", "arguments", "temporaries", "code", "HBM", "TFLOP", "GB", "sent")
COLUMNS += ("bound", "time", "at most")


def write(folder: Path, path: Path) -> None:
    """Write the tables of all results in `folder` to `path`."""
    every = [read_json(file) for file in folder.glob("*.json")]
    found = sorted((r for r in every if r["identity"].get("accounting") == ACCOUNTING), key=_order)
    versions = sorted({f"JAX {r['identity']['jax']} and libtpu {r['identity']['libtpu']}" for r in found})
    quick, results, latency = [r for r in found if r["identity"]["effort"] == -1], [], []
    for r in quick:
        (latency if r["job"] == "latency" else results).append(r)
    body = TEXT + f"\nCompiled with {', '.join(versions)}.\n"
    if len(found) < len(every):
        body += (
            f"\nOf {len(every)} programs, {len(every) - len(found)} are left out: an earlier version counted them.\n"
        )
        body += "`make aot` makes them again.\n"
    for model, name in MODEL_NAMES.items():
        rows = [row(r) for r in results if r["model"] == model]
        body += f"\n## {name}\n\n" + table(COLUMNS, rows, "lllrrrrrrrrlrr") if rows else ""
    earlier, gpu = folder / BEFORE, folder / GPU
    body += latency_table(latency) + weak_scaling(results) + effort_table(found, quick) + causes_table(results)
    body += gpu_table(read_json(gpu)) if gpu.is_file() else ""
    body += (before_table(read_json(earlier), results) if earlier.is_file() else "") + collectives(results)
    write_text(path, body)


def causes_table(results: list[dict[str, Any]]) -> str:
    """The largest movers of bytes of every job, on the smallest topology of each generation."""
    smallest: dict[tuple, dict[str, Any]] = {}
    for r in results:
        key = r["job"], r["model"], r["topology"].split(":")[0]
        if key not in smallest or r["devices"] < smallest[key]["devices"]:
            smallest[key] = r
    body = (
        "\n## What moves the bytes\n\n"
        "The five JAX operations whose instructions move most bytes to and from HBM, on the smallest topology of each\n"
        "generation. A fusion counts as the operation that it ends in; `copy` stands for copies, transpositions and\n"
        "reshapes, most of which XLA adds for another layout or memory, `pallas_call` for attention's kernels.\n\n"
    )
    rows = [(*key, f"{r['bytes_accessed'] / 1e9:.3g}", _shares(r)) for key, r in smallest.items()]
    return body + table(("job", "model", "chip", "GB", "of which"), rows, "lllrl")


def gpu_table(results: dict[str, dict[str, Any]]) -> str:
    """Bytes by cause of the jobs that `eval.aot_gpu` compiled."""
    body = (
        "\n## What moves the bytes on a GPU\n\n"
        "Compiled for one NVIDIA H200 without one, by `make aot-gpu`, hence with kernels chosen untimed. Products are\n"
        "XLA's own or cuBLAS's; a call of a library counts with its operands and results.\n\n"
    )
    rows = [
        (
            r["job"],
            r["model"],
            f"{r['items']:,} {r['unit']}",
            r["products"],
            f"{r['temporaries'] / GIB:.2f} GiB",
            f"{r['bytes_accessed'] / 1e9:.3g}",
            f"{1e3 * r['memory_seconds']:.3g} ms",
            _shares(r),
        )
        for r in results.values()
    ]
    header = ("job", "model", "per call", "products", "temporaries", "GB", "at peak bandwidth", "of which")
    return body + table(header, rows, "llrlrrrl")


def _shares(r: dict[str, Any]) -> str:
    return ", ".join(f"{name} {size / r['bytes_accessed']:.0%}" for name, size in causes(r))


def causes(r: dict[str, Any]) -> list[tuple[str, float]]:
    """The largest movers of bytes of a program and their bytes, largest first."""
    return sorted(r["causes"].items(), key=lambda item: -item[1])


def before_table(before: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Every job beside the same of an earlier version, whose results `before` holds with their commit."""
    body = (
        f"\n## Before and after\n\nBefore is commit {before['commit']}: XLA's own attention, whole batches decoded at\n"
        "once, bytes by XLA's count, which takes in the chip's own memory. Batches are per device; the last columns\n"
        "are the time bound for each item and what binds.\n\n"
    )
    rows = []
    for r in results:
        key = [r[name] for name in ("job", "model", "topology")]
        for old in before["results"]:
            if [old[name] for name in ("job", "model", "topology")] == key:
                pairs = zip(_per_item(old), _per_item(r), strict=True)
                rows.append([*key, *(cell for pair in pairs for cell in pair)])
    header = ["job", "model", "topology"]
    for name in ("batch", "temporaries, GiB", "HBM", "MB an item", "time an item"):
        header += [name, "now"]
    return body + table(header, rows, "lll" + "r" * 10)


def _per_item(r: dict[str, Any]) -> tuple[str, ...]:
    memory, items = r["memory"], r["items"] / r["devices"]
    return (
        f"{items:,.0f}",
        f"{memory['temporaries'] / GIB:.2f}",
        f"{memory['total'] / memory['hbm']:.0%}",
        f"{r['bytes_accessed'] / items / 1e6:,.3g}",
        f"{1e6 / items * max(r['roofline_seconds'].values()):,.3g} us, {r['bound']}",
    )


def collectives(results: list[dict[str, Any]]) -> str:
    """Kind, number and size of the collectives of every program that has any."""
    rows = [
        (r["job"], r["model"], r["topology"], c["kind"], str(c["count"]), f"{c['bytes'] / 1e6:,.1f}")
        for r in results
        for c in r["collectives"]
    ]
    header = ("job", "model", "topology", "kind", "number", "MB")
    return "\n## Collectives\n\nPer device and call, by kind.\n\n" + table(header, rows, "llllrr")


def latency_table(results: list[dict[str, Any]]) -> str:
    """One image by more and more devices; nothing where there is no result."""
    if not results:
        return ""
    body = (
        "\n## One image by several devices\n\n"
        "Job `latency`: one prompt, Stable Diffusion 1.5, 512x512, 25 guided steps. The pair of latents of guidance\n"
        "is split over `data`, heads and hidden channels over `tensor`. The time is the larger of compute and memory,\n"
        "and then the collectives, as though nothing overlapped; latency of collectives is not in it.\n\n"
    )
    header = ("topology", "devices", "data", "tensor", "parameters, GiB", "collectives", "sent", "exchange", "time")
    rows = []
    results = sorted(results, key=lambda r: (r["topology"], r["devices"], r["mesh"]["tensor"]))
    for r in results:
        alone = next((x for x in results if x["topology"] == r["topology"] and x["devices"] == 1), None)
        number = sum(c["count"] for c in r["collectives"])
        sent = sum(c["sent"] for c in r["collectives"])
        rows.append(
            (
                r["topology"],
                str(r["devices"]),
                str(r["mesh"]["data"]),
                str(r["mesh"]["tensor"]),
                f"{r['memory']['arguments'] / GIB:.2f}",
                f"{number:,}",
                f"{sent / 1e6:,.0f} MB",
                f"{1e3 * r['roofline_seconds']['interconnect']:.0f} ms",
                f"{1e3 * _serial(r):.0f} ms",
                f"{_serial(alone) / _serial(r):.1f}" if alone else "-",
            )
        )
    return body + table((*header, "speed-up"), rows)


def _serial(r: dict[str, Any]) -> float:
    bounds = r["roofline_seconds"]
    return max(bounds["compute"], bounds["memory"]) + bounds["interconnect"]


def effort_table(found: list[dict[str, Any]], quick: list[dict[str, Any]]) -> str:
    """Programs compiled with another effort beside those of the least; nothing where there are none."""
    rows = []
    for r in found:
        if r["identity"]["effort"] == -1:
            continue
        same = [x for x in quick if all(x.get(key) == r.get(key) for key in ("job", "model", "topology", "mesh"))]
        if not same:
            continue
        for x in (same[0], r):
            memory = x["memory"]
            rows.append(
                (
                    x["job"],
                    x["model"],
                    x["topology"],
                    f"{x['identity']['effort']:g}",
                    f"{memory['temporaries'] / GIB:.2f} GiB",
                    f"{memory['code'] / 2**20:.0f} MiB",
                    f"{memory['total'] / memory['hbm']:.0%}",
                    f"{x['bytes_accessed'] / 1e9:.3g}",
                    f"{1e3 * max(x['roofline_seconds'].values()):.3g} ms",
                    f"{x['compile_seconds']:.0f} s",
                )
            )
    if not rows:
        return ""
    head = "\n## With XLA's own effort\n\nEffort 0 is what runs use. Compile times are of one machine.\n\n"
    header = ("job", "model", "topology", "effort", "temporaries", "code", "HBM", "GB", "time", "compiled in")
    return head + table(header, rows, "lll" + "r" * 7)


def weak_scaling(results: list[dict[str, Any]]) -> str:
    """The same job and batch per device on more and more chips of a kind, where there are several such results."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["job"], r["model"], r["topology"].split(":")[0], r["batch"]), []).append(r)
    rows = []
    for (job, model, chip, _), group in groups.items():
        group = sorted(group, key=lambda r: r["devices"])
        if len(group) < 2:
            continue
        for r in group:
            sent = sum(c["sent"] for c in r["collectives"])
            first, time = (max(x["roofline_seconds"].values()) for x in (group[0], r))
            efficiency = f"{first / time:.0%}"
            cells = (job, model, chip, str(r["devices"]), f"{sent / 1e6:,.3g} MB", f"{1e3 * time:.3g} ms", efficiency)
            rows.append(cells)
    if not rows:
        return ""
    head = (
        "\n## Weak scaling\n\nThe batch of a device stays, the number of devices grows. The last column is the time\n"
    )
    head += "bound with the fewest devices over that with these; latency of collectives is not in it.\n\n"
    return head + table(("job", "model", "chip", "devices", "sent by a device", "time", "efficiency"), rows, "lllrrrr")


def row(r: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one line of the table."""
    memory, seconds = r["memory"], max(r["roofline_seconds"].values())
    sent = sum(c["sent"] for c in r["collectives"])
    return (
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


def _order(r: dict[str, Any]) -> tuple:
    return JOB_ORDER.index(r["job"]), r["model"] == "scenes", r["model"], r["topology"].split(":")[0], r["devices"]
