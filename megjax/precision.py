"""The precision of products outside networks: exact float32 on every device, whatever JAX's default there is.

And the one exemption from strict promotion of types, for other libraries.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Num

EXACT = jax.lax.Precision.HIGHEST
"""By default GPUs round float32 factors of products and convolutions to 10 bits (TF32) and TPUs to 7 (bfloat16)."""


def exact_matmul(a: Num[ArrayLike, "*m k"], b: Num[ArrayLike, "*k_n"]) -> Num[Array, "*m_n"]:
    """Matrix product `a @ b` of vectors, matrices or stacks of them, in full float32 on every device."""
    return jnp.matmul(a, b, precision=EXACT)


def promoting(function: Callable) -> Callable:
    """`function` of another library that mixes types inside: promoted as usual there, whatever the rule outside."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


class LayerNorm(nnx.LayerNorm):
    """Flax's layer normalisation, which promotes half precision to float32 inside."""

    __call__ = promoting(nnx.LayerNorm.__call__)
