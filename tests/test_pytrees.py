"""Tests that the structure of a dataclass is its own, and that its fields are leaves or structure as declared."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import pytest

from megjax import channel, power
from megjax.codec import coders
from megjax.pytrees import pytree_dataclass, static


@pytree_dataclass
class Sum:
    """Two numbers."""

    left: float
    right: float
    scale: int = static(default=1)

    def __call__(self):
        return self.scale * (self.left + self.right)


@pytree_dataclass
class Difference(Sum):
    """The same fields, another meaning."""

    def __call__(self):
        return self.scale * (self.left - self.right)


def test_leaves_and_structure():
    leaves, structure = jax.tree.flatten(Sum(2.0, 3.0, 4))
    assert leaves == [2.0, 3.0]
    assert jax.tree.unflatten(structure, leaves) == Sum(2.0, 3.0, 4)
    assert structure != jax.tree.structure(Sum(2.0, 3.0, 5))
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Sum(2.0, 3.0))] == [
        ".left",
        ".right",
    ]


def test_classes_with_the_same_fields_have_structures_of_their_own():
    assert jax.tree.structure(Sum(2.0, 3.0)) != jax.tree.structure(Difference(2.0, 3.0))
    # Were the structures equal, the second class would run the program of the first, if their hashes met.
    run = jax.jit(lambda model: model())
    assert [float(run(cls(jnp.float32(2), jnp.float32(3)))) for cls in (Sum, Difference)] == [5, -1]
    # Structures of classes made anew, of the same name too, differ.
    made = [pytree_dataclass(type("Made", (Sum,), {})) for _ in range(20)]
    assert len({jax.tree.structure(cls(2.0, 3.0)) for cls in made}) == 20


def test_fields_are_frozen():
    with pytest.raises(AttributeError):
        Sum(1.0, 2.0).left = 3.0


def structures(module):
    """Structure by name of every pytree dataclass of a package, its fields being leaves."""
    found = {}
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if not dataclasses.is_dataclass(cls):
            continue
        blank = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(blank, field.name, 0.0)
        if jax.tree.structure(blank) != jax.tree.structure(0.0):
            found[cls.__name__] = jax.tree.structure(blank)
    return found


def test_no_two_classes_of_the_library_share_a_structure():
    found = structures(channel) | structures(coders) | structures(power)
    assert {"CausalOptimum", "ChannelInversion", "KLTCoder", "RayleighFading", "TDL"} <= set(found)
    shared = [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
    assert not shared
