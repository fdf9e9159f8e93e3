"""Tables of the parts that megjax knows by name, such as fading laws and schemes, which other packages can extend."""

import dataclasses
import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, Protocol, TypeVar, runtime_checkable

from megjax.configs import require


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
    removed with its file. Other software registers parts by a call of `register`, or by an entry point of `group` that
    names a part, or a module that registers some, which is imported at the first lookup too.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind, self.package, self.group = kind, package, group
        self._parts: dict[str, Part] = {}
        self._complete = False

    def register(self, part: Part, replace: bool = False) -> Part:
        """Add a part and return it, so that this decorates classes; ValueError if its name is taken by another.

        With `replace` a part of the same name is dropped.
        """
        known = self._parts.get(part.name)
        require(known is None or known is part or replace, f"name of a {self.kind}", part.name, "not yet registered")
        self._parts[part.name] = part
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
        """Import the package's modules and the entry points, once."""
        if self._complete:
            return
        self._complete = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                part = point.load()
                if hasattr(part, "rank"):
                    self.register(part)
            except Exception as error:  # another package's fault must not take the others' parts away
                warnings.warn(f"{self.kind} {point.name!r} cannot be loaded: {error}", stacklevel=2)
