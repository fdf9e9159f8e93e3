"""Transmission over block fading with absolute noise, and the LMMSE and zero-forcing receivers that know the gains.

Powers p_t are linear; `noise_var` is sigma^2 > 0 per complex symbol and never depends on the signal, its power or its
fading. Symbols have unit mean power. Receivers take one noise variance or one per block [t]: one that holds LMMSE
estimates of the gains, with error variance e, passes them as `gains` and noise_var + power * e as `noise_var`.
Equations: D. Tse and P. Viswanath, "Fundamentals of Wireless Communication", 2005, chapter 2 (block fading) and
appendix A.3 (LMMSE estimation).
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.parameters import check, check_noise_var
from megjax.channel.random import complex_normal
from megjax.numerics import safe_sqrt, squared_magnitude


def transmit(
    key: Key[Array, ""],
    symbols: Complex[Array, "t k"],
    gains: Complex[Array, " t"],
    power: Float[Array, " t"],
    noise_var: Float[ArrayLike, ""],
) -> Complex[Array, "t k"]:
    """Received symbols y_t = sqrt(p_t) h_t s_t + n_t, n_t ~ CN(0, noise_var), complex64 [t k].

    Raises ValueError for other shapes and, outside jit, for a power or a noise variance that is negative or not finite.
    """
    if symbols.ndim != 2 or gains.shape != symbols.shape[:1] or power.shape != gains.shape:
        shapes = f"symbols {symbols.shape}, gains {gains.shape}, power {power.shape}"
        raise ValueError(f"shapes are {shapes}; they must be [t k], [t] and [t]")
    check("power", power, "finite and 0 or more", lambda p: p >= 0)
    check("noise_var", noise_var, "finite and 0 or more", lambda var: var >= 0)
    noise = complex_normal(key, symbols.shape)
    amplitude, noise_std = safe_sqrt(power).astype(jnp.complex64), jnp.sqrt(noise_var).astype(jnp.complex64)
    return (amplitude * gains)[:, None] * symbols + noise_std * noise


def equalize_lmmse(
    received: Complex[Array, "t k"],
    gains: Complex[Array, " t"],
    power: Float[Array, " t"],
    noise_var: Float[ArrayLike, ""] | Float[Array, " t"],
) -> Complex[Array, "t k"]:
    """LMMSE estimate of unit-variance symbols, s^_t = sqrt(p_t) conj(h_t) y_t / (p_t |h_t|^2 + noise_var).

    The error variance is `lmmse_error_var`; a block without power gives zeros. The estimate is shrunk by
    gamma_t / (1 + gamma_t), gamma_t as in `post_equalisation_snr`: hard decisions on QAM take `equalize_zf` instead.
    Raises ValueError, outside jit, unless noise_var > 0.
    """
    check_noise_var(noise_var)
    weight = safe_sqrt(power).astype(jnp.complex64) * jnp.conj(gains)
    weight = weight / (power * squared_magnitude(gains) + noise_var).astype(jnp.complex64)
    return weight[:, None] * received


def equalize_zf(
    received: Complex[Array, "t k"], gains: Complex[Array, " t"], power: Float[Array, " t"]
) -> Complex[Array, "t k"]:
    """Zero-forcing estimate s^_t = y_t / (sqrt(p_t) h_t), unbiased; the LMMSE estimate times (1 + gamma_t) / gamma_t.

    The error variance is `zf_error_var`. A block without power or gain carries no signal and gives zeros.
    """
    magnitude = squared_magnitude(gains)
    usable = (power > 0) & (magnitude > 0)
    weight = jnp.conj(gains) / jnp.where(usable, safe_sqrt(power) * magnitude, 1.0).astype(jnp.complex64)
    return jnp.where(usable, weight, 0)[:, None] * received


def post_equalisation_snr(
    gains: Complex[Array, " t"], power: Float[Array, " t"], noise_var: Float[ArrayLike, ""] | Float[Array, " t"]
) -> Float[Array, " t"]:
    """gamma_t = p_t |h_t|^2 / noise_var, the linear signal-to-noise ratio of each block; needs noise_var > 0."""
    check_noise_var(noise_var)
    return power * squared_magnitude(gains) / noise_var


def lmmse_error_var(
    gains: Complex[Array, " t"], power: Float[Array, " t"], noise_var: Float[ArrayLike, ""] | Float[Array, " t"]
) -> Float[Array, " t"]:
    """E|s^_t - s_t|^2 = 1 / (1 + gamma_t) of `equalize_lmmse`, in (0, 1]; 1 in a block without power or gain."""
    return 1 / (1 + post_equalisation_snr(gains, power, noise_var))


def zf_error_var(
    gains: Complex[Array, " t"], power: Float[Array, " t"], noise_var: Float[ArrayLike, ""] | Float[Array, " t"]
) -> Float[Array, " t"]:
    """E|s^_t - s_t|^2 = 1 / gamma_t of `equalize_zf`; 1 in a block without power or gain, whose estimate is zero."""
    snr = post_equalisation_snr(gains, power, noise_var)
    usable = snr > 0
    return jnp.where(usable, 1 / jnp.where(usable, snr, 1.0), 1.0)
