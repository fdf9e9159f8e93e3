"""Random keys as users give them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from megjax.configs import is_integer


def as_key(key: Any) -> Key[Array, ""]:
    """The typed key that `key` stands for: a seed's is `jax.random.key(seed)`, an old Threefry key's has its words.

    Raises ValueError for anything else, old keys of other generators included.
    """
    if is_integer(key) and -(2**31) <= key < 2**32:
        return jax.random.key(int(key))
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
        what = f"{key.dtype} of shape {key.shape}"
    else:
        what = repr(key) if isinstance(key, int | float | str | None) else type(key).__name__
    raise ValueError(f"key is {what}; it must be one key, as jax.random.key(seed) makes, or a 32-bit seed")
