"""Random keys: what users may give, and the one generator that all draws come from.

Only Threefry draws the same numbers for a key whatever else is drawn beside it. The words of `rbg` keys depend on the
batch under `vmap`, so that realisation i would change with the number computed at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from megjax.configs import is_integer

THREEFRY = "threefry2x32"


def from_seed(seed: int) -> Key[Array, ""]:
    """The Threefry key of a seed, whatever `jax_default_prng_impl` is."""
    return jax.random.key(seed, impl=THREEFRY)


def threefry(key: Key[Array, "*k"]) -> Key[Array, "*k"]:
    """The same keys if they are Threefry's; keys of other generators become Threefry keys made of all of their words.

    It is for the start of a function that draws: before the key is split and before anything is vmapped, or inside
    `vmap`, where it keeps each key's draws apart from its neighbours'.
    """
    if str(jax.random.key_impl(key)) == THREEFRY:
        return key
    words = jnp.asarray(jax.random.key_data(key), jnp.uint32)

    def one(words):
        made = jax.random.wrap_key_data(words[:2], impl=THREEFRY)
        for word in words[2:]:
            made = jax.random.fold_in(made, word)
        return made

    return jax.vmap(one)(words.reshape(-1, words.shape[-1])).reshape(key.shape)


def as_key(key: Any) -> Key[Array, ""]:
    """The Threefry key that `key` stands for: a typed key's, a seed's, or that of an old key's two words.

    Raises ValueError for anything else, old keys of other generators included.
    """
    if is_integer(key) and -(2**31) <= key < 2**32:
        return from_seed(int(key))
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return threefry(key)
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(jnp.asarray(key), impl=THREEFRY)
        what = f"{key.dtype} of shape {key.shape}"
    else:
        what = repr(key) if isinstance(key, int | float | str | None) else type(key).__name__
    raise ValueError(f"key is {what}; it must be one key, as jax.random.key(seed) makes, or a 32-bit seed")
