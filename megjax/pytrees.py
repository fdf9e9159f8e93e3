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
