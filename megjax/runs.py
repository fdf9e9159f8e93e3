"""The folder of a training run: the settings that it belongs to, what is logged, and its newest whole checkpoint."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from clu import parameter_overview
from jaxtyping import PyTree

from megjax.configs import read_json, write_json
from megjax.files import write_text
from megjax.processes import gather


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard; rows after the step that is resumed from are dropped first."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # the line that a kill cut short is the last one
        write_text(self.path, "".join(line + "\n" for line in kept))
        from tensorboardX import SummaryWriter  # takes PyTorch along

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


def check_same_run(folder: Path, description: Any) -> None:
    """Record `description` (JSON) in a new run folder; ValueError if the folder belongs to another description."""
    folder.mkdir(parents=True, exist_ok=True)
    path, description = folder / "config.json", json.loads(json.dumps(description, default=str))
    if not path.exists():
        if jax.process_index() == 0:
            write_json(path, description)
    elif (found := read_json(path)) != description:
        old, new = _flatten(found), _flatten(description)
        names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(names)}); choose another folder")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def describe_parameters(params: PyTree) -> str:
    """A table of every parameter's name, shape, dtype and size, and their total."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x for path, x in leaves}
    return parameter_overview.get_parameter_overview(named, include_stats=False) + "\n"


def write_waiting(folder: Path, step: int, waiting: list[tuple[int, dict]]) -> None:
    """Keep metrics of the steps after the last log line, for a run that goes on from `step`."""
    values = [[count, {name: float(x) for name, x in metrics.items()}] for count, metrics in waiting]
    write_json(folder / "waiting.json", {"step": step, "metrics": values})


def read_waiting(folder: Path, step: int) -> list[tuple[int, dict]]:
    """What `write_waiting` kept for this step."""
    path = folder / "waiting.json"
    found = read_json(path) if step and path.is_file() else {}
    if found.get("step") != step:
        return []
    return [(count, {name: np.float32(x) for name, x in metrics.items()}) for count, metrics in found["metrics"]]


def newest(manager: ocp.CheckpointManager, state: PyTree) -> PyTree:
    """The newest checkpoint that can be read, with the structure of `state`, which is returned if there is none.

    Newer ones that cannot be read are moved out of the way, to `damaged-STEP` beside the folder of checkpoints, and
    told on stderr: the run goes on from the older one. Many processes use the newest that all of them can read. Raises
    ValueError if there are checkpoints but none can be read.
    """
    folder, damaged = Path(manager.directory), []
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    for step in sorted(manager.all_steps(), reverse=True):
        found, reason = None, ""
        try:
            found = manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax, TensorStore and the file system have many
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = next(filter(None, gather(reason)), "")
        if not reason:
            _put_aside(folder, damaged, step)
            if damaged:
                manager.reload()
            return found
        damaged.append((step, reason))
    if damaged:
        told = "; ".join(f"step {step}: {reason[:300]}" for step, reason in damaged)
        raise ValueError(f"{folder} holds no checkpoint that can be read ({told}); remove the folder to train anew")
    return state


def _put_aside(folder: Path, damaged: list[tuple[int, str]], step: int) -> None:
    """Move checkpoints that cannot be read, once for all processes, and say so."""
    for broken, reason in damaged if jax.process_index() == 0 else ():
        aside = folder.parent / f"damaged-{broken}"
        if aside.exists():
            shutil.rmtree(aside)
        (folder / str(broken)).rename(aside)
        told = f"the checkpoint of step {broken} cannot be read ({reason[:300]}) and is now {aside}"
        print(f"{told}; going on from step {step}", file=sys.stderr)
    gather()
