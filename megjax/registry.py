"""Tables of the parts that megjax knows by name, such as fading laws and schemes, which other packages can extend."""

import dataclasses
import functools
import hashlib
import importlib
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, Protocol, TypeVar, runtime_checkable

from megjax.configs import require

MODULES = "MEGJAX_PARTS"
"""Environment variable with modules, separated by commas, that are imported at the first lookup and register parts."""


@runtime_checkable
class Named(Protocol):
    """What every part of a registry states about itself: a record, or a class with these as attributes."""

    name: str
    title: str
    version: int | None
    rank: int


Part = TypeVar("Part", bound=Named)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Name under which a part is asked for, and what files, tables and plots say about it."""

    name: str
    title: str
    """Short name for tables and plots."""
    version: int | None = None
    """Number that is raised whenever the part's results change; sweeps file results under it. Without a number they are
    filed under the text of the module that defines the part."""
    rank: int = 100
    """Position in tables and plots, smallest first, equal ones by name."""


class Registry(Generic[Part]):
    """The parts of one kind by name: those of the modules of a package, those registered, and those of entry points.

    Every module of `package` is imported at the first lookup and registers its own parts, so that a part is added or
    removed with its file. Other software registers parts by a call of `register`, by an entry point of `group` that
    names a part or a module that registers some, or in a module that the environment variable `MODULES` names.
    `check(part)` raises ValueError for a part that lacks something.
    """

    def __init__(self, kind: str, package: str, group: str, check: Callable[[Part], None] | None = None):
        self.kind, self.package, self.group, self._check = kind, package, group, check
        self._parts: dict[str, Part] = {}
        self._complete = self._collecting = False

    def register(self, part: Part, replace: bool = False) -> Part:
        """Add a part and return it, so that this decorates classes.

        With `replace` a part of the same name is dropped; so is a class that is defined again under its own name, as in
        a notebook. ValueError for a part that lacks something, or whose name another one has.
        """
        name = getattr(part, "name", None)
        valid = isinstance(name, str) and re.fullmatch(r"[\w+.-]+", name) is not None
        require(valid, f"name of a {self.kind}", name, "of letters, digits and the signs _ + . -")
        if self._check is not None:
            self._check(part)
        known = self._parts.get(name)
        again = isinstance(known, type) and isinstance(part, type) and _path(known) == _path(part)
        free = known is None or known is part or again or replace
        require(free, f"name of a {self.kind}", name, "not yet registered, or registered with replace=True")
        self._parts[name] = part
        return part

    def remove(self, name: str) -> None:
        """Forget a part; nothing happens if there is none of this name."""
        self._parts.pop(name, None)

    def find(self, name: str, setting: str | None = None) -> Part:
        """The part of this name; ValueError naming the setting (by default the kind) and all known names."""
        known = self.names
        require(isinstance(name, str) and name in known, setting or self.kind, name, f"one of {', '.join(known)}")
        return self._parts[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parts, by rank."""
        return tuple(part.name for part in self)

    def version_of(self, name: str) -> int | str:
        """The version that a part declares, or else a digest of the text of the module of its class or first function.

        ValueError if there is neither, as in a notebook. A class does not inherit the version of the one it extends.
        """
        part = self.find(name)
        version = vars(part).get("version")
        if version is not None:
            return version
        file = getattr(sys.modules.get(_module_of(part)), "__file__", None)
        require(file is not None, f"version of {self.kind} {name!r}", None, "a number, as its module has no file")
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def __str__(self) -> str:
        """Kind and names, for help texts."""
        return f"{self.kind}: {', '.join(self.names)}"

    def __contains__(self, name: str) -> bool:
        self._collect()
        return name in self._parts

    def __iter__(self) -> Iterator[Part]:
        self._collect()
        return iter(sorted(self._parts.values(), key=lambda part: (part.rank, part.name)))

    def _collect(self) -> None:
        """Import the package's modules, the user's and the entry points, once."""
        if self._complete or self._collecting:  # modules that are imported here may look parts up
            return
        self._collecting = True
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            names = filter(None, os.environ.get(MODULES, "").split(","))
            modules = (EntryPoint(MODULES, name.strip(), self.group) for name in names)
            for point in (*modules, *entry_points(group=self.group)):
                self._load(point)
            self._complete = True
        finally:
            self._collecting = False

    def _load(self, point) -> None:
        """Register what an entry point names; a fault in it is a warning, and leaves the other parts."""
        try:
            part = point.load()
            if not isinstance(part, ModuleType):
                require(hasattr(part, "rank"), "object", point.value, f"a module or the record of a {self.kind}")
                self.register(part)
        except Exception as error:
            warnings.warn(f"{self.kind}: {point.value!r} of {point.name} cannot be loaded: {error}", stacklevel=2)


def _module_of(part: Named) -> str | None:
    """Name of the module of a class, or of the first function of a record."""
    if isinstance(part, type):
        return part.__module__
    functions = (value.func if isinstance(value, functools.partial) else value for value in vars(part).values())
    return next((function.__module__ for function in functions if callable(function)), None)


def _path(part: type) -> tuple[str, str]:
    return part.__module__, part.__qualname__
