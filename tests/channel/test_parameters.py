"""Tests of channel models as pytrees that are checked when built, and only then."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel.parameters import channel_model, check, scalar
from megjax.configs import require_count
from megjax.pytrees import static


@channel_model
class Model:
    """A model with a swept parameter of at least 0.5 and a static size."""

    m: object = 1.0
    size: int = static(2)

    def __post_init__(self):
        check("m", self.m, "0.5 or more", lambda m: m >= 0.5)
        require_count("size", self.size)

    def values(self):
        return jnp.full(self.size, scalar("m", self.m))


def test_leaves_and_structure():
    leaves, structure = jax.tree.flatten(Model(3.0, 4))
    assert leaves == [3.0] and structure == jax.tree.structure(Model(7.0, 4)) != jax.tree.structure(Model(3.0, 5))
    assert jax.tree.unflatten(structure, leaves) == Model(3.0, 4)
    ((path, _),) = jax.tree_util.tree_leaves_with_path(Model(3.0))
    assert jax.tree_util.keystr(path) == ".m"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Model().m = 2.0


def test_vmap_over_a_parameter():
    models = Model(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(jax.vmap(Model.values)(models), [[1, 1], [2, 2], [3, 3]])
    with pytest.raises(ValueError, match="m has shape .*vmap over the model"):
        models.values()


def test_gradients_are_models_whatever_their_sign():
    gradient = jax.jit(jax.grad(lambda model: -5 * jnp.sum(model.values())))(Model(1.0))
    assert float(gradient.m) == -10.0


def test_integers_and_lists_become_floats():
    assert float(jax.grad(lambda model: jnp.sum(model.values()))(Model(3)).m) == 2.0
    np.testing.assert_array_equal(jax.vmap(Model.values)(Model([1, 2])), [[1, 1], [2, 2]])
    assert Model(np.array([1, 2])).m.dtype == jnp.float32


def test_tracers_pass_and_values_are_checked():
    assert float(jax.jit(lambda m: Model(m).values()[0])(0.1)) == pytest.approx(0.1)
    for bad in (0.4, np.nan, np.inf, [1.0, 0.2], jnp.array(0.3), "one", "3", None, True, 3 + 4j, np.array(3 + 4j)):
        with pytest.raises(ValueError, match="^m is .*; it must be 0.5 or more$"):
            Model(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2", None])
def test_counts(bad):
    with pytest.raises(ValueError, match="size is .*; it must be an integer of at least 1"):
        Model(1.0, bad)


@channel_model
class Outer:
    """A model that holds another one."""

    inner: object
    scale: object = 1.0
    note: object = None

    def values(self):
        return scalar("scale", self.scale) * self.inner.values()


def test_leaves_are_broadcast_so_that_vmap_finds_its_axis():
    given = Model(2.0)
    outer = Outer(given, jnp.array([1.0, 10.0]))
    np.testing.assert_array_equal(jax.vmap(Outer.values)(outer), [[2, 2], [20, 20]])
    assert given.m == 2.0  # a copy was broadcast
    swept = Outer(Model(jnp.array([1.0, 2.0])), 10.0)
    np.testing.assert_array_equal(jax.vmap(Outer.values)(swept), [[10, 10], [20, 20]])
    with pytest.raises(ValueError, match=r"leaves of shapes inner \(2,\), scale \(3,\); they must broadcast to one"):
        Outer(Model(jnp.ones(2)), jnp.ones(3))


def test_what_is_no_channel_model_keeps_its_shape():
    table = {"taps": np.arange(5)}
    assert Outer(table, jnp.ones(2)).inner is table
