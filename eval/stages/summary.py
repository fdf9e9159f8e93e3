"""The figures that decide, of all stages in one table: next to which peer, and what was aimed at."""

from typing import Any

from eval import markdown
from eval.stages.codec import COMPILED, EAGER

COLUMNS = ("stage", "measured", "beside", "megjax is", "aim", "reached", "device")
SIONNA, NUMPY = "Sionna", "NumPy, a thread a core"
LOOP = "megjax, a loop over receptions"
FLAX = "Flax of diffusers"
AGAIN = ", again"
"""End of the name of what a later part of `eval.gpu` measured a second time; such rows are not compared."""
PUREJAXRL, SB3 = "PureJaxRL-style loop", "stable-baselines3"
RATES = {
    "channel": (
        "per_second",
        "Rayleigh fading and noise",
        (SIONNA, NUMPY, EAGER, COMPILED),
        {SIONNA: 3.0, NUMPY: 1.8, EAGER: 1.0},
    ),
    "codec": ("steps_per_second", "training of the codec", (EAGER, COMPILED), {EAGER: 1.0}),
    "power": ("steps_per_second", "PPO", (PUREJAXRL, SB3), {PUREJAXRL: 1.2, SB3: 6.0}),
    "diffusion": (
        "flops_per_second",
        "a call of the U-Net",
        (EAGER, COMPILED, "Flax of"),
        {EAGER: 1.0, "Flax of": 1.8},
    ),
    "image": ("seconds", "a whole image", (EAGER, COMPILED, "Flax of"), {EAGER: 1.0, "Flax of": 1.8}),
    "system": ("images_per_second", "images received", (LOOP, EAGER, COMPILED), {LOOP: 1.0, EAGER: 1.0}),
}
"""Stage -> column of the rate (or its inverse), what it is of, peers by the start of their names, least ratios."""
ON_GPU = {stage: {COMPILED: 1.0, "Flax of": 1.8} for stage in ("diffusion", "image")}
"""Least ratios on a GPU, where they are others."""
LEAST_OF_MATMUL, LARGE = 0.55, 16
"""Of the U-Net in half precision on a GPU, from so many inputs on."""
IMAGE_STEPS = {1: ("54.5 eager, 66.0 compiled, 104.6 with stable-fast, H100", 66, 105), 16: ("75, A100", 150, 200)}
"""Guided images at a time -> steps a second, all images together, that others report of Stable Diffusion 1.5; aimed at
on an H200; hoped for."""
MAX_COMPILATION_S, MAX_CACHED_S = {"cpu": 120.0}, 15.0


def table(results: list[dict[str, Any]]) -> str:
    """The table as Markdown, of the results of the stages in any order; nothing where none has a peer beside it."""
    ordered = sorted(results, key=lambda result: [*RATES, result["stage"]].index(result["stage"]))
    lines = [line for result in ordered for line in _lines(result)]
    return markdown.table(COLUMNS, lines, "l" * len(COLUMNS)) if lines else ""


def _lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    stage = result["stage"]
    if stage not in RATES or not result["rows"]:
        return []
    column, what, peers, aims = RATES[stage]
    on_gpu = result["platform"] == "gpu"
    aims = ON_GPU.get(stage, aims) if on_gpu else aims
    of_case = [row for row in result["rows"] if row["case"] == _main_case(result)]
    batches = list(dict.fromkeys(row["batch"] for row in of_case))
    lines = []
    for batch in batches if stage in ON_GPU else batches[:1]:
        rows = [row for row in of_case if row["batch"] == batch]
        if all(row["implementation"] != "megjax" for row in rows):  # as where it had too little memory
            continue
        mark = f", batch {batch}" if len(batches) > 1 and stage in ON_GPU else ""
        lines += _of_batch(stage, rows, (column, what, peers, aims), mark, result)
    return lines


def _of_batch(stage: str, rows: list[dict], measured: tuple, mark: str, result: dict[str, Any]) -> list[tuple]:
    """The lines of one case at one batch, which `mark` names where there are several."""
    (column, what, peers, aims), device, platform = measured, result["device"], result["platform"]
    what += mark
    ours = next(row for row in rows if row["implementation"] == "megjax")
    lines = []
    for peer in peers:
        for row in (row for row in rows if is_of(row["implementation"], peer)):
            ratio = ours[column] / row[column]
            ratio = 1 / ratio if column == "seconds" else ratio
            aim = aims.get(peer)
            reached = "-" if aim is None else ("yes" if ratio >= aim else "**no**")
            aimed = "-" if aim is None else f"{aim:g} times"
            lines.append((stage, what, row["implementation"], f"{ratio:.2f} times as fast", aimed, reached, device))
    if stage == "diffusion" and platform == "gpu" and ours["batch"] >= LARGE:
        share = ours["share_of_matmul"]
        reached = "yes" if share >= LEAST_OF_MATMUL else "**no**"
        line = (stage, what, "matmul", f"{100 * share:.0f} %", f"{100 * LEAST_OF_MATMUL:.0f} %", reached, device)
        lines.append(line)
    lines += _of_steps(stage, ours, device) if stage in ON_GPU and "H200" in device else []
    return lines + (_of_image(rows, ours, mark, (device, platform)) if stage == "image" else [])


def is_of(name: str, peer: str) -> bool:
    """Whether a row's name is that of a peer, whatever version or mode it goes on with."""
    return name.startswith(peer) and not name.endswith(AGAIN)


def _of_steps(stage: str, ours: dict, device: str) -> list[tuple[str, ...]]:
    """Image-steps a second next to what others report: of the U-Net alone, or with text encoder and image decoder."""
    images = ours["batch"] // 2 if stage == "diffusion" else ours["batch"]
    if images not in IMAGE_STEPS or "sd15" not in ours["case"]:
        return []
    reported, least, more = IMAGE_STEPS[images]
    rate = (images if stage == "diffusion" else ours["steps"]) / ours["seconds"]
    reached = "**no**" if rate < least else "yes" if rate < more else f"yes, and {more}"
    what = "image-steps a second, " + ("one guided image" if images == 1 else f"{images} guided images")
    return [(stage, what, reported, f"at {rate:.1f}", f"{least}, then {more}", reached, device)]


def _main_case(result: dict[str, Any]) -> str:
    """The case with peers in it: the last of `power`, the first of the others."""
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    return cases[-1] if result["stage"] == "power" else cases[0]


def _of_image(rows: list[dict], ours: dict, mark: str, machine: tuple[str, str]) -> list[tuple[str, ...]]:
    """Memory and compilation of a whole image."""
    lines, (device, platform) = [], machine
    for row in rows:
        if row["implementation"] == EAGER:
            ratio = ours["peak_bytes"] / row["peak_bytes"]
            reached = "yes" if ratio <= 1 else "**no**"
            lines.append(
                ("image", f"peak memory{mark}", EAGER, f"{ratio:.2f} times as large", "1 times", reached, device)
            )
    limits = {"compilation": MAX_COMPILATION_S.get(platform, 60.0), "from the cache": MAX_CACHED_S}
    columns = {"compilation": "compilation_s", "from the cache": "cached_s"}
    for name, column in ((name, column) for name, column in columns.items() if ours[column] is not None):
        reached = "yes" if ours[column] <= limits[name] else "**no**"
        ready = f"ready in {ours[column]:.1f} s"
        lines.append(("image", name + mark, "-", ready, f"{limits[name]:g} s", reached, device))
    return lines
