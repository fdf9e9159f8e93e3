"""Chains of optax's transformations that work under every rule of type promotion."""

from typing import Any

import jax
import optax


def chain(*transformations: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.chain` with the types promoted as usual inside: Adam's bias correction mixes a float with an integer."""
    whole = optax.chain(*transformations)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return whole.update(updates, state, params)

    return optax.GradientTransformation(whole.init, update)
