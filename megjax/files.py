"""Files that are written whole or not at all, and safetensors files read strictly."""

import contextlib
import errno
import glob
import json
import os
import platform
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "C64")
"""Types of a safetensors file that NumPy has, by their names there."""
FLOAT8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
"""Types of 8 bits by their names in a safetensors file, whose NumPy reader does not know them."""


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends, so that a kill leaves a whole one.

    No two processes get the same file, so each may write `path` at any time. An error in the block removes it, and the
    next to write `path` removes those that killed processes of the same machine left.
    """
    machine = re.sub(r"\W", "", platform.node())
    part = path.with_name(f"{path.name}.{machine}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    for other in path.parent.glob(f"{glob.escape(path.name)}.{machine}-*.part"):
        if not _runs(int(other.name.split("-")[-2])):
            other.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write the whole file in one step, in UTF-8: a kill leaves the old one or the new one."""
    with in_one_step(path) as part:
        part.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous arrays and metadata as a safetensors file in one step; OSError if that fails."""
    with in_one_step(path) as part:
        part.touch()
        mode = part.stat().st_mode
        try:
            save_file(dict(arrays), part, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from None
        part.chmod(mode)  # safetensors keeps other users from reading what it writes


def read_safetensors(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises ValueError, in one line that names the file, if it is absent, damaged, a pointer or of another format, if an
    array has a type that NumPy lacks, and, listing all that is wrong, unless the arrays have the names and shapes of
    `expected`, whose values are arrays or their shapes and types, and are finite.
    """
    with _opened(path) as file:
        arrays = {name: _read_array(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    problems = [] if expected is None else misfits(arrays, expected)
    if expected is not None:
        fitting = [name for name in sorted(arrays) if name in expected and arrays[name].shape == expected[name].shape]
        wrong = [name for name in fitting if not np.all(np.isfinite(arrays[name]))]
        problems += [f"{name} has values that are not finite" for name in wrong]
    if problems:
        raise ValueError(f"{path} does not fit its configuration: {'; '.join(problems)}")
    return arrays


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; ValueError naming the file if it is absent or damaged."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def misfits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What keeps arrays from having the names and shapes of those expected, one line each."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"extra {name}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
    return problems


def require_content(path: Path) -> None:
    """ValueError if the file `path` is a Git LFS pointer, which stands for content that was not downloaded."""
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs.github.com/")
    if pointer:
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in its folder"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, open for reading; ValueError naming it for whatever goes wrong with it."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            require_content(Path(path))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole safetensors file (truncated or corrupted): {reason}") from None


def _read_array(path: Path, file: safe_open, name: str) -> np.ndarray:
    kind = file.get_slice(name).get_dtype()
    if kind in FLOAT8:
        return _read_float8(path, name)
    if kind not in READABLE:
        raise ValueError(f"{path}: type of {name} is {kind!r}; it must be one of {(*READABLE, *FLOAT8)}")
    return file.get_tensor(name)


def _read_float8(path: Path, name: str) -> np.ndarray:
    """A tensor of 8-bit floats, from its place in the file: a length of 8 bytes, that many of JSON, then the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), FLOAT8[entry["dtype"]]).reshape(entry["shape"])
