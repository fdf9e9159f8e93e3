"""The file of stored outputs: the parts they belong to, how computed ones are compared, how it is written."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

PATH = Path(__file__).with_name("stored.safetensors")
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
    def prefix(self) -> str:
        """What the stored names of its arrays begin with."""
        return f"{self.kind}/{self.name}/{self.version}/"


def outputs(**values) -> dict[str, np.ndarray]:
    """Arrays by name as they are stored: complex ones as pairs of real and imaginary parts along a last axis."""
    arrays = {name: np.asarray(jax.device_get(value)) for name, value in values.items()}
    return {
        name: np.stack([array.real, array.imag], -1) if np.iscomplexobj(array) else array
        for name, array in arrays.items()
    }


@functools.cache
def load() -> dict[str, np.ndarray]:
    """Every stored array by its full name; nothing where there is no file yet."""
    return load_file(PATH) if PATH.exists() else {}


def stored_outputs(part: Part) -> dict[str, np.ndarray]:
    """The stored arrays of a part at its version."""
    return {name.removeprefix(part.prefix): x for name, x in load().items() if name.startswith(part.prefix)}


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
    """Write the file anew with the outputs of these parts, at their versions, and nothing else.

    Arrays that agree with stored ones stay as they are, so that rounding never changes the file. ValueError, and the
    file stays, if a part's outputs differ from those stored under the same version.
    """
    kept, changed = {}, []
    for part in parts:
        before, now = stored_outputs(part), part.compute()
        lines = differences(before, now) if before else []
        changed += [f"{part}: {line}" for line in lines]
        kept |= {part.prefix + name: np.array(array, order="C") for name, array in (before or now).items()}
    if changed:
        advice = "raise the version of each of these parts if that is meant (or remove the file to begin anew)"
        raise ValueError("\n".join([f"outputs have changed under an unchanged version; {advice}:", *changed]))
    save_file(dict(sorted(kept.items())), PATH)
