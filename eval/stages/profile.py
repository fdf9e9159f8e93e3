"""The largest costs of every stage's program, by the function of the library that asked for the work."""

import collections
import glob
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.peers.lines import Served, serve
from eval.stages import STAGES, Measured, Stage

PROGRAMS = ("channel", "codec", "power", "diffusion", "system")
"""Stages whose program is looked at."""
NUM_COSTS = 3
COLUMNS = ["function", "where", "share of the time (%)"]
_OPS = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = .*? ([a-z][\w\-]*)\((?:.*stack_frame_id=(\d+))?", re.MULTILINE)
_CONTAINERS = {"while", "call", "conditional"}


def run(stages: tuple[str, ...] = PROGRAMS) -> Measured:
    """Rows of the benchmark file, no missing peers, and notes. Each stage is traced in a process of its own."""
    rows, notes = [], ["Time is that of XLA's operations, added over threads, in one call after the first."]
    for stage in stages:
        try:
            costs = of_process("eval.stages.profile", stage)["costs"]
        except RuntimeError as error:
            notes.append(f"{stage} was not profiled: {error}.")
            continue
        for place, share in costs[:NUM_COSTS]:
            function, _, file = place.partition(" in ")
            row = {"case": f"largest costs of stage {stage}", "batch": 0, "implementation": function, "file": file}
            rows.append({**row, "share": share})
    return rows, [], notes


def of_process(module: str, stage: str) -> dict[str, Any]:
    """What a script of this kind says of a stage, in a process that keeps the text of its programs; RuntimeError."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=NONE"
        environ = {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}  # nothing is dumped of what is read
        served = Served([sys.executable, "-m", module], {"stage": stage, "dump": dump}, environ)
        served.close()
    return served.about


def cells(row) -> list[str]:
    """One line of the table."""
    return [row.implementation, row.file, f"{100 * row.share:.0f}"]


def tables(text: str) -> dict[str, dict[int, str]]:
    """The tables of source places that XLA prints at the head of a module, by name: number -> rest of the line."""
    found = {}
    for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        part = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        lines = part[1].splitlines() if part else []
        found[name] = {int(number): rest for number, rest in (line.split(" ", 1) for line in lines)}
    return found


def places(text: str) -> dict[str, str]:
    """Operation -> "function in file", of the innermost frame inside the library, else of the innermost at all.

    Operations that hold others are left out.
    """
    known = tables(text)

    def numbers(table: str, i: int) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", known[table].get(i, ""))}

    def place(frame: int) -> str:
        innermost = ""
        while frame in known["StackFrames"]:
            found = numbers("StackFrames", frame)
            location = numbers("FileLocations", found["file_location_id"])
            file = known["FileNames"].get(location.get("file_name_id", 0), "").strip('"')
            function = known["FunctionNames"].get(location.get("function_name_id", 0), "").strip('"')
            here = (
                f"{function.replace('.<locals>', '')} in {re.sub('.*/(?=megjax/|eval/)|.*/site-packages/', '', file)}"
            )
            if "/megjax/" in file:
                return here
            innermost = innermost or here
            if (parent := found.get("parent_frame_id", frame)) == frame:
                break
            frame = parent
        return innermost

    ops = {}
    for name, kind, frame in _OPS.findall(text):
        if kind not in _CONTAINERS:
            ops[name] = place(int(frame)) if frame else "operations of the compiler"
    return ops


def traced(call: Callable[[], Any]) -> dict[tuple[str, str], list[float]]:
    """(module, operation) -> nanoseconds of every time that it ran in a call."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    events = collections.defaultdict(list)
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    events[stats["hlo_module"], stats["hlo_op"]].append(event.duration_ns)
    return events


def text_of(module: str, dump: str) -> str:
    """The program that ran, from XLA's dump; empty if it is not there."""
    files = sorted(Path(dump).glob(f"module_*.{module}.*after_optimizations.txt"))
    return files[-1].read_text() if files else ""


def costs_of(call: Callable[[], Any], dump: str) -> list[tuple[str, float]]:
    """Shares of the time of `call`, which has run before, by place, the largest first; XLA's modules are in `dump`."""
    events = traced(call)
    by_place: dict[str, float] = collections.Counter()
    for module in {module for module, _ in events}:
        known = places(text_of(module, dump))
        for (owner, op), nanoseconds in events.items():
            if owner == module and op in known:
                by_place[known[op]] += sum(nanoseconds)
    total = sum(by_place.values())
    return [(place, value / total) for place, value in sorted(by_place.items(), key=lambda item: -item[1])]


def program(stage: str) -> Callable[[], Any]:
    """A call of the stage's program at the sizes of its benchmark."""
    import jax.numpy as jnp
    import numpy as np

    from eval.aot_jobs import model_configs
    from eval.stages import channel, codec, diffusion, power, system
    from megjax.codec import SeedCodec
    from megjax.codec.recipe import PRESETS
    from megjax.diffusion.pipeline import StableDiffusion

    if stage == "channel":
        return channel.block_fading(65_536, dict.fromkeys(channel.PEERS))[3][0].call
    if stage == "codec":
        recipe = PRESETS["scenes"]
        shape = (codec.NUM_LATENTS, *recipe.codec.latent_shape)
        return codec.megjax_contender(recipe, np.random.default_rng(0).standard_normal(shape, np.float32), 5).call
    if stage == "power":
        env = power.PowerControl(power.NUM_BLOCKS)
        params = env.make_params(snr_db=power.SNR_DB)
        return power.trainers(env, params, 4_096, dict.fromkeys(power.PEERS))[0].call
    if stage == "diffusion":
        configs, length = model_configs("sd15", jnp.float32)
        return diffusion.UNetCall(configs.unet, length, 2)
    pipe, seed = StableDiffusion.from_pretrained("scenes"), SeedCodec.from_pretrained("scenes")
    return system.Parts(system.seed_simulator(pipe, seed), np.asarray(seed.validation[:8], np.float32), 20, 40).received


def _make(request: dict[str, Any]):
    call = program(request["stage"])
    call()
    return {"costs": costs_of(call, request["dump"])}, call, None


STAGES.register(
    Stage(
        name="profile",
        title="the largest costs of every program",
        version=1,
        rank=120,
        run=lambda args, _: run(),
        columns=COLUMNS,
        cells=cells,
    )
)


if __name__ == "__main__":
    serve(_make)
