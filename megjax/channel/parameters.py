"""Channel models as frozen dataclasses whose swept parameters are pytree leaves, checked when a user builds one."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from megjax.pytrees import pytree_dataclass

Model = TypeVar("Model")
_NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)


def channel_model(cls: type[Model]) -> type[Model]:
    """`pytree_dataclass` of a channel model, whose `__post_init__` checks what a user passes.

    When some leaves are arrays, to be vmapped over, all of them, also those of
    channel models inside this one, are broadcast to one shape, so that vmap finds its axis in each.
    """
    own_check = getattr(cls, "__post_init__", lambda model: None)

    def check_and_broadcast(model):
        own_check(model)
        for name, value in _fields(model):
            object.__setattr__(model, name, _as_leaf(value))
        shape = _common_shape(model)
        if shape:
            _give_shape(model, shape)

    cls.__post_init__ = check_and_broadcast
    cls.is_channel_model = True
    return pytree_dataclass(cls)


def _fields(model: Any) -> list[tuple[str, Any]]:
    """Names and values of the leaves and models in a model."""
    return [(f.name, getattr(model, f.name)) for f in dataclasses.fields(model) if not f.metadata.get("static")]


def _as_leaf(value: Any) -> Any:
    """Integers as floats, which can be differentiated, and lists of numbers as arrays; anything else as it is."""
    if isinstance(value, bool | np.bool_):
        return value
    if isinstance(value, int | np.integer):
        return float(value)
    numbers = isinstance(value, list | tuple) and np.asarray(value).dtype.kind in "iuf"
    integers = isinstance(value, np.ndarray | jax.Array) and np.issubdtype(value.dtype, np.integer)
    return jnp.asarray(value, jnp.float32) if numbers or integers else value


def _common_shape(model: Any) -> tuple[int, ...]:
    """The shape to which all leaves of a model broadcast; ValueError when there is none."""
    shapes = {}
    for name, value in _fields(model):
        if getattr(value, "is_channel_model", False):
            shapes[name] = _common_shape(value)
        elif isinstance(value, _NUMBERS):
            shapes[name] = jnp.shape(value)
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{type(model).__name__} has leaves of shapes {listed}; they must broadcast to one") from None


def _give_shape(model: Any, shape: tuple[int, ...]) -> None:
    """Broadcast the leaves of a model under construction; models inside it are replaced, not changed."""
    for name, value in _fields(model):
        if getattr(value, "is_channel_model", False):
            inner = jax.tree.unflatten(jax.tree.structure(value), jax.tree.leaves(value))
            _give_shape(inner, shape)
            object.__setattr__(model, name, inner)
        elif isinstance(value, _NUMBERS) and jnp.shape(value) != shape:
            object.__setattr__(model, name, jnp.broadcast_to(jnp.asarray(value), shape))


def check(name: str, value: Any, allowed: str, valid: Callable[[np.ndarray], Any]) -> None:
    """ValueError unless `value`, a number or an array of them, is finite and `valid` holds for all of it.

    `allowed` completes the sentence "it must be ...". Tracers pass: inside jit there are no values to check.
    """
    if isinstance(value, jax.core.Tracer):
        return
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" and not jnp.issubdtype(numbers.dtype, jnp.floating):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    numbers = numbers.astype(np.float64)
    if not (np.all(np.isfinite(numbers)) and np.all(valid(numbers))):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_noise_var(noise_var: Any) -> None:
    """ValueError unless the noise variance, or each of them, is finite and positive."""
    check("noise_var", noise_var, "finite and more than 0", lambda var: var > 0)


def number(law: Any, name: str) -> float:
    """A law's leaf as a Python number; ValueError when it is an array, or traced, as tables are made outside jit."""
    value, owner = getattr(law, name), type(law).__name__
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{owner}.{name} is traced, by jit, vmap or grad; tables of a law are made outside of them")
    if jnp.ndim(value):
        raise ValueError(f"{owner}.{name} has shape {jnp.shape(value)}; tables are made for one law: give it a number")
    return float(value)


def scalar(name: str, value: ArrayLike) -> Float[Array, ""]:
    """A leaf as a float32 scalar; ValueError when it is an array, over which the caller has to vmap."""
    if jnp.ndim(value):
        raise ValueError(f"{name} has shape {jnp.shape(value)}; one realisation takes a scalar: vmap over the model")
    return jnp.asarray(value, jnp.float32)
