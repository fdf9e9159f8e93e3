"""What a sweep files a point under: registered names, declared versions and arrays, so that no comment matters."""

import functools
import hashlib
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megjax.channel import FADINGS, Fading, find_fading
from megjax.configs import require
from megjax.diffusion.samplers import SAMPLERS
from megjax.power import POLICIES, Policy, find_policy
from megjax.registry import Registry
from megjax.system import SCHEMES, Scheme


def digest(values: Any) -> str:
    """SHA-256 of what JSON makes of `values`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def load_object(path: str, setting: str, method: str) -> Any:
    """The object at `module:attribute`, which has `method`; a class or a function is called without arguments first.

    ValueError naming the setting when there is no such module or attribute, or the object lacks the method.
    """
    module, _, attribute = path.partition(":")
    require(bool(module and attribute), setting, path, "a known name or module:attribute")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{setting} is {path!r}, which cannot be imported: {error}") from None
    if inspect.isclass(value) or (callable(value) and not hasattr(value, method)):
        try:
            value = _made(value)
        except TypeError as error:
            raise ValueError(f"{setting} is {path!r}, which cannot be made without arguments: {error}") from None
    require(callable(getattr(value, method, None)), setting, path, f"an object with a method {method!r}")
    return value


@functools.cache
def _made(factory: Any) -> Any:
    """One object for all points, so that they share a compiled program."""
    return factory()


def sweep_fading(name: str) -> Fading:
    """The law of a name or import path; ValueError naming what is wrong with it."""
    if name.partition(":")[0] in FADINGS or ":" not in name:
        return find_fading(name, "fadings", ", or module:attribute")
    return load_object(name, "fadings", "sample")


def sweep_policy(name: str) -> str | Policy:
    """A name of `megjax.power.POLICIES` as it is, or the policy at an import path."""
    plain, colon, _ = name.partition(":")
    setting = f"policies (of {', '.join(POLICIES.names)}, or module:attribute)"
    if colon and plain not in POLICIES:
        return load_object(name, setting, "allocate")
    find_policy(name, setting)
    return name


def part_identity(registry: Registry, name: str, value: Any) -> list[Any]:
    """What tells a part of this name from another: its version and its arrays, or its module's text and attributes.

    `value` is the part as it was made. The text stands in where the part declares no version, as users' own may not;
    what its module imports from elsewhere is not looked at. ValueError if there is neither version nor text.
    """
    plain = name.partition(":")[0]
    if plain not in registry:
        return [name, object_digest(name, value)]
    return [name, registry.version_of(plain), array_digest(value)]


def object_digest(path: str, value: Any) -> str:
    """Digest of a user's object of this import path: the text of its module, and its attributes."""
    return digest([_module_digest(path.partition(":")[0]), _state(value, ())])


def scheme_identity(name: str, scheme: Scheme) -> list[Any]:
    """What tells a scheme from another, its options being part of its name."""
    sampler = getattr(scheme, "device_sampler", None)
    device = [] if sampler is None else [sampler_identity(sampler)]
    return part_identity(SCHEMES, name, scheme.weights()) + device


def sampler_identity(name: str) -> str:
    """Name and version of a sampler."""
    return f"{name} {SAMPLERS.version_of(name)}"


def _module_digest(module: str) -> str:
    """Digest of a module's text, empty where it has no file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return digest("" if file is None else Path(file).read_text())


def array_digest(value: Any) -> str:
    """Digest of an object's class name and leaves."""
    kind = type(value)
    found = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}".encode())
    for leaf in jax.tree.leaves(value):
        found.update(np.asarray(leaf).tobytes() if isinstance(leaf, np.ndarray | jax.Array) else repr(leaf).encode())
    return found.hexdigest()


def _state(value: Any, above: tuple[int, ...]) -> Any:
    """Everything that an object is made of, down to arrays, the same in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
    if id(value) in above:
        return "above"
    inner = (*above, id(value))
    if isinstance(value, dict):
        return sorted((str(name), digest(_state(item, inner))) for name, item in value.items())
    if isinstance(value, list | tuple):
        return [_state(item, inner) for item in value]
    kind = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    attributes = {} if kind is value else getattr(value, "__dict__", {})
    return [f"{kind.__module__}.{kind.__qualname__}", _state(attributes, inner)]
