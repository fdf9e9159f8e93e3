"""Conversions between decibels and linear power ratios; the library's only logarithms to base 10 are here."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

MAX_SNR_DB = 300
"""Beyond it 10^(snr_db / 10) leaves the range of float32 (10^38) with the powers and gains that multiply it."""


def db_to_linear(value_db: ArrayLike) -> Float[Array, "*s"]:
    """Power ratio 10^(value_db / 10), elementwise."""
    return jnp.power(10.0, jnp.asarray(value_db, jnp.float32) / 10)


def linear_to_db(value: ArrayLike) -> Float[Array, "*s"]:
    """10 log10(value) in dB, elementwise; 0 gives -inf."""
    return 10 * jnp.log10(jnp.asarray(value, jnp.float32))


def noise_var_from_snr_db(snr_db: ArrayLike) -> Float[Array, "*s"]:
    """Absolute noise variance per complex symbol, sigma^2 = 10^(-snr_db / 10): `snr_db` always means 1 / sigma^2.

    Raises ValueError, outside jit, for values that `check_snr_db` refuses.
    """
    if not isinstance(snr_db, jax.core.Tracer):
        check_snr_db(snr_db)
    return db_to_linear(-jnp.asarray(snr_db, jnp.float32))


def check_snr_db(snr_db) -> np.ndarray:
    """`snr_db` (a number, or a nested list or array of them, but no string) as a float64 NumPy array.

    For use outside jit. Raises ValueError when any entry is not a number within +-`MAX_SNR_DB`, or is traced.
    """
    if isinstance(snr_db, jax.core.Tracer):
        raise ValueError("snr_db is traced, by jit, vmap or grad; what checks it must be called outside of them")
    try:
        given = np.asarray(snr_db)
        values = (
            given.astype(np.float64)
            if jnp.issubdtype(given.dtype, jnp.number) and not jnp.iscomplexobj(given)
            else None
        )
    except (TypeError, ValueError):
        values = None
    if values is None:
        raise ValueError(f"snr_db is {snr_db!r}; it must be a finite number in dB") from None
    if not np.all(np.isfinite(values)):
        raise ValueError(f"snr_db is {snr_db!r}; every value must be a finite number in dB")
    if np.any(np.abs(values) > MAX_SNR_DB):
        raise ValueError(f"snr_db is {snr_db!r}; every value must be within +-{MAX_SNR_DB} dB")
    return values
