"""Transmission over block fading with absolute noise, and the LMMSE receiver that knows the gains.

Powers p_t are linear; `noise_var` is sigma^2 > 0 per complex symbol and never depends on the signal, its power or its
fading. Symbols have unit mean power. Equations: D. Tse and P. Viswanath, "Fundamentals of Wireless Communication",
2005, chapter 2 (block fading) and appendix A.3 (LMMSE estimation).
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Key

from megjax.channel.random import complex_normal


def transmit(
    key: Key[Array, ""],
    symbols: Complex[Array, "t k"],
    gains: Complex[Array, " t"],
    power: Float[Array, " t"],
    noise_var: Float[ArrayLike, ""],
) -> Complex[Array, "t k"]:
    """Received symbols y_t = sqrt(p_t) h_t s_t + n_t, n_t ~ CN(0, noise_var), complex64 [t k]."""
    noise = complex_normal(key, symbols.shape)
    return (_amplitude(power) * gains)[:, None] * symbols + jnp.sqrt(noise_var) * noise


def equalize_lmmse(
    received: Complex[Array, "t k"],
    gains: Complex[Array, " t"],
    power: Float[Array, " t"],
    noise_var: Float[ArrayLike, ""],
) -> Complex[Array, "t k"]:
    """LMMSE estimate of unit-variance symbols, s^_t = sqrt(p_t) conj(h_t) y_t / (p_t |h_t|^2 + noise_var).

    The error variance is 1 / (1 + gamma_t), gamma_t as in `post_equalisation_snr`; a block without power gives zeros.
    """
    weight = _amplitude(power) * jnp.conj(gains) / (power * _squared_magnitude(gains) + noise_var)
    return weight[:, None] * received


def post_equalisation_snr(
    gains: Complex[Array, " t"], power: Float[Array, " t"], noise_var: Float[ArrayLike, ""]
) -> Float[Array, " t"]:
    """gamma_t = p_t |h_t|^2 / noise_var, the linear signal-to-noise ratio of each block."""
    return power * _squared_magnitude(gains) / noise_var


def _squared_magnitude(gains: Complex[Array, " t"]) -> Float[Array, " t"]:
    return jnp.square(gains.real) + jnp.square(gains.imag)


def _amplitude(power: Float[Array, " t"]) -> Float[Array, " t"]:
    """sqrt(power) with gradient 0, instead of infinity, where the power is 0."""
    on = power > 0
    return jnp.where(on, jnp.sqrt(jnp.where(on, power, 1.0)), 0.0)
