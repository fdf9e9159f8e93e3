"""Small arithmetic that several parts of the channel share."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


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
