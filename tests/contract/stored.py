"""Stored outputs: the parts they belong to, how computed ones are compared, how their files are written."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).with_name("stored")
"""One file for each part and version."""
TOLERANCE = 1e-4
"""Largest difference of floats, relative to the largest magnitude of their array."""
RECORD = "`python -m tests.contract.record` records it"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the library: `compute()` gives its outputs as arrays by name, always the same ones.

    `version` is raised by whoever means to change the numbers; `slow` parts are left out of `make test`.
    """

    kind: str
    name: str
    compute: Callable[[], dict[str, np.ndarray]]
    slow: bool = False
    version: str = "1"

    def __str__(self):
        return f"{self.kind}/{self.name}"

    @property
    def path(self) -> Path:
        """File of its outputs at its version."""
        return FOLDER / self.kind / f"{self.name.replace(':', '-')}.{self.version}.safetensors"


def outputs(**values) -> dict[str, np.ndarray]:
    """Arrays by name as they are stored: complex ones as pairs of real and imaginary parts along a last axis."""
    arrays = {name: np.asarray(jax.device_get(value)) for name, value in values.items()}
    return {
        name: np.stack([array.real, array.imag], -1) if np.iscomplexobj(array) else array
        for name, array in arrays.items()
    }


def stored_outputs(part: Part) -> dict[str, np.ndarray]:
    """The stored arrays of a part at its version; none where there is no file yet."""
    return load_file(part.path) if part.path.exists() else {}


def others(parts: Iterable[Part]) -> list[Path]:
    """Stored files that belong to none of these parts."""
    return sorted(set(FOLDER.rglob("*.safetensors")) - {part.path for part in parts})


def differences(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[str]:
    """What distinguishes two sets of outputs, a line each; nothing where they agree."""
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} is not stored" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if difference := _difference(expected[name], found[name]):
            lines.append(f"{name}: {difference}")
    return lines


def _difference(expected: np.ndarray, found: np.ndarray) -> str:
    forms = [(array.shape, str(array.dtype)) for array in (expected, found)]
    if forms[0] != forms[1]:
        return f"shape and type are {forms[1]}, stored {forms[0]}"
    if not np.issubdtype(expected.dtype, np.floating):
        return "" if np.array_equal(expected, found) else f"{found.tolist()}, stored {expected.tolist()}"
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return f"values that are not finite are others: {found.tolist()}, stored {expected.tolist()}"
    values, others = expected[finite].astype(np.float64), found[finite].astype(np.float64)
    largest, error = np.abs(values).max(initial=0), np.abs(others - values).max(initial=0)
    if error <= TOLERANCE * largest:
        return ""
    return f"off by up to {error:.3g}, where the largest stored magnitude is {largest:.3g}"


def record(parts: Iterable[Part]) -> None:
    """Write the outputs of those of all parts that have none at their version, and remove the files of no part.

    ValueError, and no file changes, if a part's outputs differ from those stored under the same version.
    """
    new, changed, parts = {}, [], tuple(parts)
    for part in parts:
        now = part.compute()
        if before := stored_outputs(part):
            changed += [f"{part}: {line}" for line in differences(before, now)]
        else:
            new[part] = {name: np.array(array, order="C") for name, array in now.items()}
    if changed:
        advice = "raise the version of each of these parts if that is meant (or remove its file to begin anew)"
        raise ValueError("\n".join([f"outputs have changed under an unchanged version; {advice}:", *changed]))
    for part, arrays in new.items():
        part.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, part.path)
    for path in others(parts):
        path.unlink()
