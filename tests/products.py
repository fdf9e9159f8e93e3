"""The matrix products and convolutions of traced functions: whose they are, and which precision they ask for."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import source_info_util

from megjax.precision import EXACT
from tests.checks import unchecked

PRIMITIVES = ("dot_general", "conv_general_dilated")
NETWORK_LAYERS = ("/flax/nnx/nn/", *(f"/megjax/diffusion/{name}.py" for name in ("attention", "layers", "winograd")))
"""Code whose products are a network's: what `jax.default_matmul_precision` is for."""


class Product(NamedTuple):
    """One product of a traced program, by the innermost line of it that is neither JAX's nor Python's own."""

    place: str
    precision: Any
    network: bool


def products(function: Callable, *args, gradient: bool = False) -> list[Product]:
    """Products of `function(*args)`, arrays or their shapes, and with `gradient` of its derivative by all of them."""
    with unchecked():
        return list(_products(jax.make_jaxpr(_pulled_back(function) if gradient else function)(*args).jaxpr))


def inexact_products(function: Callable, *args, gradient: bool = False) -> list[str]:
    """Places of the products outside networks that do not ask for exact float32."""
    found = products(function, *args, gradient=gradient)
    return [p.place for p in found if not p.network and p.precision != (EXACT, EXACT)]


def _pulled_back(function: Callable) -> Callable:
    def values_and_gradients(*args):
        leaves, tree = jax.tree.flatten(args)
        inexact = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]

        def values(chosen):
            filled = dict(zip(inexact, chosen, strict=True))
            given = tree.unflatten(filled.get(i, leaf) for i, leaf in enumerate(leaves))
            return [leaf for leaf in jax.tree.leaves(function(*given)) if _is_inexact(leaf)]

        found, pull = jax.vjp(values, [jnp.asarray(leaves[i]) for i in inexact])
        return pull([jnp.ones_like(leaf) for leaf in found])

    return values_and_gradients


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _products(jaxpr: Any, caller: Any = None) -> Iterator[Product]:
    """Products of a jaxpr and of those inside it; a gradient's have the lines of what they are the gradient of.

    What JAX's own compiled functions multiply is their caller's.
    """
    for equation in jaxpr.eqns:
        frame = source_info_util.user_frame(equation.source_info.traceback) or caller
        if equation.primitive.name in PRIMITIVES:
            place = f"{frame.file_name}:{frame.start_line} {frame.function_name}"
            network = any(part in frame.file_name for part in NETWORK_LAYERS)
            yield Product(place, equation.params["precision"], network)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from _products(getattr(value, "jaxpr", value), frame)
