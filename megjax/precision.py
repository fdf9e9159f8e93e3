"""The precision of products outside networks: exact float32 on every device, whatever JAX's default there is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Num

EXACT = jax.lax.Precision.HIGHEST
"""By default GPUs round float32 factors of products and convolutions to 10 bits (TF32) and TPUs to 7 (bfloat16)."""


def exact_matmul(a: Num[ArrayLike, "*m k"], b: Num[ArrayLike, "*k_n"]) -> Num[Array, "*m_n"]:
    """Matrix product `a @ b` of vectors, matrices or stacks of them, in full float32 on every device."""
    return jnp.matmul(a, b, precision=EXACT)
