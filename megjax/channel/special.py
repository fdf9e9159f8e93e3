"""Special functions of fading theory that JAX lacks, elementwise in float32 and differentiable.

Arguments are numbers or arrays that broadcast, and the result has their common shape. Invalid ones raise ValueError
outside jit. Relative errors are measured against float64 references.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from megjax.channel.parameters import check
from megjax.numerics import polynomial

_EULER_GAMMA = np.float32(0.5772156649015329)
_EXP1_SERIES = tuple((-1.0) ** (k + 1) / (k * math.factorial(k)) for k in range(12, 0, -1))
"""Coefficients of E1(x) + ln x + gamma, highest power first, without the common factor x."""
_EXP1_DEPTH = 24
"""Levels of the continued fraction, enough for float32 at x = 1, where it converges slowest."""
_BESSEL_SPLIT = 12.0
_BESSEL_NODES = 32
_HANKEL = tuple(math.prod(((2 * i - 1) ** 2 / (8 * i) for i in range(1, k + 1)), start=1.0) for k in range(9))
"""Coefficients of 1 / x^k in the expansion of J0 for large x, up to their signs."""
_RICE_REACH = 7.0
"""Standard deviations from its mean at which the Rice density is negligible in float32."""


def q_function(x: ArrayLike) -> Float[Array, "*s"]:
    """Q(x) = P(N(0, 1) > x), the Gaussian tail; relative error under 2e-5 down to 1e-35."""
    return 0.5 * jax.lax.erfc(jnp.asarray(x, jnp.float32) * np.float32(math.sqrt(0.5)))


def scaled_exp1(x: ArrayLike) -> Float[Array, "*s"]:
    """exp(x) E1(x) for x > 0, E1(x) the exponential integral; relative error under 1e-6 from 1e-8 to 1e8.

    About -ln x - 0.577 for small and 1 / x for large x. Power series up to 1 and continued fraction above:
    M. Abramowitz and I. A. Stegun, "Handbook of Mathematical Functions", 1964, section 5.1.
    """
    check("x", x, "positive and finite", lambda value: value > 0)
    x = jnp.asarray(x, jnp.float32)
    small = x < 1
    inside, outside = jnp.where(small, x, 1.0), jnp.where(small, 1.0, x)
    return jnp.where(small, jnp.exp(inside) * _exp1_series(inside), _exp1_fraction(1 / outside) / outside)


def exp1_ratio(s: ArrayLike) -> Float[Array, "*s"]:
    """x exp(x) E1(x) at x = 1 / s, s >= 0: the mean of 1 / (1 + s g) over an exponential g of mean 1.

    It falls from 1 at s = 0, where its derivative is -1. Relative error under 1e-6. Method as in `scaled_exp1`.
    """
    check("s", s, "finite and 0 or more", lambda value: value >= 0)
    s = jnp.asarray(s, jnp.float32)
    large = s > 1
    x = 1 / jnp.where(large, s, 1.0)
    return jnp.where(large, x * jnp.exp(x) * _exp1_series(x), _exp1_fraction(jnp.where(large, 1.0, s)))


def bessel_j0(x: ArrayLike) -> Float[Array, "*s"]:
    """Bessel function J0(x) of any finite x; absolute error under 5e-7.

    For |x| <= 12 the trapezoidal rule on (1 / 2 pi) int cos(x sin theta) dtheta over a period, whose error is 2 J32(x)
    < 1e-10; beyond, Hankel's asymptotic expansion: F. W. J. Olver et al., "NIST Handbook of Mathematical Functions",
    2010, sections 10.9 and 10.17.
    """
    check("x", x, "finite", np.isfinite)
    x = jnp.asarray(x, jnp.float32)
    near = jnp.abs(x) <= _BESSEL_SPLIT
    inside = jnp.where(near, x, 0.0)
    outside = jnp.abs(jnp.where(near, _BESSEL_SPLIT, x))
    # The nodes of one quarter stand for all: cos(x sin theta) is even about theta = 0 and theta = pi / 2.
    nodes = np.sin(2 * np.pi * np.arange(_BESSEL_NODES // 4 + 1) / _BESSEL_NODES)
    integral = sum(
        (np.float32(2 if 0 < i < nodes.size - 1 else 1) * jnp.cos(np.float32(node) * inside))
        for i, node in enumerate(nodes)
    ) / np.float32(_BESSEL_NODES // 2)
    inverse = 1 / outside
    even = polynomial(inverse * inverse, tuple((-1) ** i * c for i, c in enumerate(_HANKEL[::2]))[::-1])
    odd = inverse * polynomial(inverse * inverse, tuple((-1) ** i * c for i, c in enumerate(_HANKEL[1::2]))[::-1])
    # cos(x - pi/4) and sin(x - pi/4) by addition theorems: rounding x - pi/4 would cost accuracy at large x.
    cosine, sine = jnp.cos(outside), jnp.sin(outside)
    expansion = jnp.sqrt(inverse * np.float32(1 / np.pi)) * (even * (cosine + sine) + odd * (sine - cosine))
    return jnp.where(near, integral, expansion)


def marcum_q1(a: ArrayLike, b: ArrayLike) -> Float[Array, "*s"]:
    """Marcum's Q1(a, b) = P(R > b), R Rice distributed: |a + n1 + j n2| with n1, n2 ~ N(0, 1); a, b >= 0.

    The density r exp(-(r^2 + a^2) / 2) I0(a r) is integrated over the part of (b, inf) where it is not negligible, so
    small values keep their relative accuracy: M. K. Simon and M.-S. Alouini, "Digital Communication over Fading
    Channels", 2005, chapter 4.
    """
    a, b = _rice_arguments(a, b)
    return _rice_mass(a, jnp.maximum(b, a - _RICE_REACH), jnp.maximum(a, b) + _RICE_REACH)


def rice_cdf(a: ArrayLike, b: ArrayLike) -> Float[Array, "*s"]:
    """1 - Q1(a, b) = P(R <= b), R and the method as in `marcum_q1`, without cancellation where it is small."""
    a, b = _rice_arguments(a, b)
    return _rice_mass(a, jnp.maximum(jnp.minimum(a, b) - _RICE_REACH, 0.0), jnp.minimum(b, a + _RICE_REACH))


def _exp1_series(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """E1(x) for 0 < x <= 1."""
    return x * polynomial(x, _EXP1_SERIES) - _EULER_GAMMA - jnp.log(x)


def _exp1_fraction(s: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x exp(x) E1(x) at x = 1 / s for 0 <= s <= 1: 1 / (1 + s - s^2 / (1 + 3 s - 4 s^2 / (1 + 5 s - ...))).

    Written in s, so that it and its derivatives are regular at s = 0.
    """

    def level(i, denominator):
        k = np.float32(_EXP1_DEPTH) - i
        return 1 + (2 * k - 1) * s - jnp.square(k * s) / denominator

    # A loop, not unrolled: the reverse derivative of the unrolled fraction takes XLA seconds to compile.
    denominator = jax.lax.fori_loop(0, _EXP1_DEPTH, level, 1 + np.float32(2 * _EXP1_DEPTH + 1) * s)
    return 1 / denominator


def _rice_arguments(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    for name, value in (("a", a), ("b", b)):
        check(name, value, "finite and 0 or more", lambda numbers: numbers >= 0)
    return tuple(jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))


def _rice_mass(a: Float[Array, "*s"], lower: Float[Array, "*s"], upper: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Probability that a Rice variable lies between `lower` and `upper`, by Gauss-Legendre quadrature."""

    def weighted_density(node, weight):
        r = lower + node * (upper - lower)
        return weight * r * jnp.exp(-0.5 * jnp.square(r - a)) * jax.lax.bessel_i0e(a * r)

    return (upper - lower) * jnp.sum(jax.vmap(weighted_density)(*gauss_legendre()), axis=0)


@functools.cache
def gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [64] on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return ((nodes + 1) / 2).astype(np.float32), (weights / 2).astype(np.float32)
