"""Frozen dataclasses as pytrees whose structure knows their class."""

import dataclasses
from typing import Any, TypeVar

import jax

Class = TypeVar("Class")


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that changes a shape or a Python branch: part of the tree's structure, not a leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


def pytree_dataclass(cls: type[Class], *, eq: bool = True) -> type[Class]:
    """Make `cls` a frozen dataclass and a pytree: `static()` fields, all hashable, are structure, the others leaves.

    To be used in place of `jax.tree_util.register_dataclass`: there, up to JAX 0.10 at least, the structures of two
    classes with fields of the same names compare equal, so that `jax.jit` can, if their hashes happen to meet in its
    cache, run the program that it compiled for an object of one class on an object of another. Neither `__init__` nor
    `__post_init__` runs when JAX rebuilds a tree, whose leaves may be tracers, gradients or axis numbers. `eq` is as in
    `dataclasses.dataclass`: False compares objects by identity.
    """
    cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
    fields = dataclasses.fields(cls)
    leaves = tuple(field.name for field in fields if not field.metadata.get("static"))
    structure = tuple(field.name for field in fields if field.metadata.get("static"))

    def flatten_with_keys(model):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(model, name)) for name in leaves)
        return children, tuple(getattr(model, name) for name in structure)

    def flatten(model):
        return tuple(getattr(model, name) for name in leaves), tuple(getattr(model, name) for name in structure)

    def unflatten(fixed, children):
        model = object.__new__(cls)
        for name, value in (*zip(structure, fixed, strict=True), *zip(leaves, children, strict=True)):
            object.__setattr__(model, name, value)
        return model

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """An object that is no pytree, as one without leaves; `value_of` gives it back."""

    value: Any

    def __eq__(self, other):
        same = isinstance(other, Fixed) and self.value is other.value
        return same or (isinstance(other, Fixed) and _hashable(self.value) and self.value == other.value)

    def __hash__(self):
        return hash(self.value) if _hashable(self.value) else id(self.value)


def _hashable(value: Any) -> bool:
    """Whether the value can be compared; a plain dataclass or one that holds arrays cannot, and is itself only."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def as_pytree(value: Any) -> Any:
    """`value` if JAX knows how to take it apart, else wrapped as `Fixed`."""
    leaves = jax.tree.leaves(value)
    return Fixed(value) if len(leaves) == 1 and leaves[0] is value else value


def value_of(tree: Any) -> Any:
    """What `as_pytree` was given."""
    return tree.value if isinstance(tree, Fixed) else tree
