"""Small arithmetic that several parts share: magnitudes, roots by bisection, interpolation, chosen gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float


def squared_magnitude(value: Complex[Array, "*s"]) -> Float[Array, "*s"]:
    """|value|^2, elementwise, with gradient 0 at 0."""
    return jnp.square(value.real) + jnp.square(value.imag)


def safe_sqrt(value: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """sqrt(value), elementwise, with gradient 0 instead of infinity at 0; 0 below."""
    positive = value > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, value, 1.0)), 0.0)


def polynomial(x: Float[Array, "*s"], coefficients: tuple[float, ...]) -> Float[Array, "*s"]:
    """Value of a polynomial at `x`, elementwise, float32, by Horner's rule: highest power first."""
    result = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + np.float32(coefficient)
    return result


def cubic_interpolation(table: Float[Array, " n"], place: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Value of a smooth function at `place` in [0, n - 1], elementwise, from its values at 0, 1, ..., n - 1, n >= 3.

    Cubic Hermite interpolation with central differences as slopes, so that the gradient in `place` is continuous and as
    accurate as the value. Outside, the value is that of the nearer end and the gradient in `place` is 0.
    """
    ends = 2 * table[1] - 1.5 * table[0] - 0.5 * table[2], 1.5 * table[-1] - 2 * table[-2] + 0.5 * table[-3]
    slopes = jnp.concatenate([ends[0][None], 0.5 * (table[2:] - table[:-2]), ends[1][None]])
    place = jnp.clip(place, 0, table.shape[0] - 1)
    index = jnp.minimum(place.astype(jnp.int32), table.shape[0] - 2)
    # Indices are in bounds: checks of them, which a TPU keeps in main memory, cost more than the look-up.
    left, right, rise, fall = (
        values.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)
        for values in (table, slopes)
        for i in (index, index + 1)
    )
    t = place - index.astype(place.dtype)
    step = right - left
    return left + t * (rise + t * (3 * step - 2 * rise - fall + t * (rise + fall - 2 * step)))


def bisect(
    function: Callable[[Float[Array, "*s"]], Float[Array, "*s"]],
    low: Float[ArrayLike, "*#s"],
    high: Float[ArrayLike, "*#s"],
    steps: int,
) -> tuple[Float[Array, "*s"], tuple[Float[Array, "*s"], Float[Array, "*s"]]]:
    """Root of an increasing function in [low, high], elementwise, and the ends of what `steps` leave of it.

    The root is the middle. It has the gradient of the implicit function theorem, dx = -df / f'(x), in everything that
    `function` closes over, which steps of a bisection do not have, and 0 where f' is 0. JAX must be able to
    differentiate `function`, in forward mode, even if nobody asks for a gradient. The ends have no gradient. The caller
    deals with roots outside [low, high]: there the nearer end is returned, with a gradient that means nothing.
    """

    def solve(function, _):
        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            below = function(middle) < 0
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, steps, halve, bracket)
        return 0.5 * (low + high), (low, high)

    def divide(linear, value):
        slope = linear(jnp.ones_like(value))
        return jnp.where(slope != 0, value / jnp.where(slope != 0, slope, 1.0), 0.0)

    bracket = tuple(jax.lax.stop_gradient(x) for x in jnp.broadcast_arrays(*map(jnp.asarray, (low, high))))
    return jax.lax.custom_root(function, bracket[0], solve, divide, has_aux=True)


def with_gradient_of(smooth: Float[Array, "*s"], value: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`value`, to the bit, with the gradient of `smooth`, which agrees with it but for rounding."""
    return jax.lax.stop_gradient(value) + (smooth - jax.lax.stop_gradient(smooth))
