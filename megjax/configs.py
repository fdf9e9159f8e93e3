"""Reading frozen configuration dataclasses from dictionaries and JSON, strictly."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax import dtypes

from megjax.files import require_content, write_text

Config = TypeVar("Config")


def freeze(value: Any) -> Any:
    """`value` with its lists, and those within them, as tuples."""
    return tuple(freeze(item) for item in value) if isinstance(value, list) else value


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise a `ValueError` that names the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_count(name: str, value: Any, smallest: int = 1, largest: int | None = None) -> int:
    """`value` as a Python integer; ValueError unless it is an integer of Python or NumPy within these bounds."""
    allowed = f"an integer of at least {smallest}" + ("" if largest is None else f" and at most {largest}")
    require(is_integer(value) and value >= smallest and (largest is None or value <= largest), name, value, allowed)
    return int(value)


def require_number(name: str, value: Any) -> float:
    """`value` as a Python number; ValueError unless it is one finite real number, and no string."""
    array = None if isinstance(value, str | bytes | list | tuple | None) else np.asarray(value)
    single = array is not None and array.ndim == 0 and dtypes.issubdtype(array.dtype, np.number)
    require(single and np.isrealobj(array) and math.isfinite(float(array)), name, value, "one finite number")
    return float(array)


def require_type(name: str, value: Any, allowed: Collection[str]) -> np.dtype:
    """The type of numbers that `value` stands for, a name or a type; ValueError unless it is one of these names."""
    try:
        found = None if value is None else np.dtype(value)
    except TypeError:
        found = None
    require(
        found is not None and found.name in allowed, name, value if found is None else found.name, f"one of {allowed}"
    )
    return found


def from_mapping(
    cls: type[Config],
    values: Mapping[str, Any],
    *,
    only: Mapping[str, Any] | None = None,
    ignored: Collection[str] = (),
    source: str = "config",
) -> Config:
    """Build the dataclass `cls` from `values`, refusing whatever it cannot honour.

    `only` maps keys that `cls` does not model to the one value under which they change nothing; `ignored` names keys
    that never change the computation. Keys that begin with an underscore are a writer's notes. Lists become tuples.

    Raises ValueError on an unknown key, or on a key of `only` with another value.
    """
    only = only or {}
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    known = {}
    for key, value in values.items():
        if key in fields:
            known[key] = freeze(value)
        elif key in only:
            allowed = only[key]
            require(freeze(value) == allowed, f"{source}: {key}", value, f"{allowed!r} (nothing else is supported)")
        elif not key.startswith("_") and key not in ignored:
            raise ValueError(f"{source}: unknown setting {key!r} = {value!r}")
    try:
        return cls(**known)
    except TypeError as error:
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init and f.name not in known and f.default is f.default_factory is dataclasses.MISSING
        ]
        raise ValueError(f"{source}: missing {', '.join(missing)}" if missing else f"{source}: {error}") from error


def require_positive_integers(config: Any, source: str, names: Collection[str]) -> None:
    """ValueError unless each of these settings, or each item of it, is an integer of at least 1.

    NumPy's integers become Python's, which JSON has.
    """
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        valid = bool(items) and all(is_integer(item) and item > 0 for item in items)
        kind = "a tuple of positive integers" if isinstance(value, tuple) else "a positive integer"
        require(valid, f"{source}: {name}", value, kind)
        object.__setattr__(config, name, tuple(map(int, items)) if isinstance(value, tuple) else int(value))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; ValueError naming the file when it is absent or not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        require_content(path)
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; it must be an object")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write `values` as indented JSON with sorted keys, in one step; ValueError on NaN and infinities."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")
