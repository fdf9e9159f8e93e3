"""Open-loop power loading: what to spend on each of several values when the transmitter knows only the fading law."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from megjax.channel.parameters import check
from megjax.numerics import bisect, with_gradient_of

MeanError = Callable[[Float[Array, "*s"]], Float[Array, "*s"]]
"""E[1 / (1 + x g)] at the mean SNR x >= 0, elementwise, over the law of the gain g of mean 1.

JAX differentiates it twice, in forward mode.
"""

_OUTER_STEPS = 32
"""Halvings of the largest load, which lies in [1, m]."""
_INNER_STEPS = 40
"""Halvings of the other loads: to 1e-12 of the largest, as far below it as ten decades of weights put them."""


def mean_lmmse_error_awgn(snr: ArrayLike) -> Float[Array, "*s"]:
    """1 / (1 + snr): the LMMSE error of a unit-variance value without fading, elementwise, at the linear `snr`.

    The counterpart of `theory.mean_lmmse_error_rayleigh` and its kin. Raises ValueError, outside jit, for an SNR that
    is negative or not finite.
    """
    check("snr", snr, "finite and 0 or more", lambda value: value >= 0)
    return 1 / (1 + jnp.asarray(snr, jnp.float32))


def static_load(
    weights: Float[Array, " m"], snr: Float[ArrayLike, ""], mean_error: MeanError = mean_lmmse_error_awgn
) -> Float[Array, " m"]:
    """Loads l [m] of mean 1 that minimise sum_k w_k E[1 / (1 + l_k snr g)], for a gain g known to the receiver only.

    `weights` [m] are 0 or more: variances of values sent at unit power, or what the errors of fading blocks cost.
    `snr` is the linear P / sigma^2 at load 1. `mean_error` is the mean over the fading law, convex and decreasing:
    `mean_lmmse_error_awgn`, `theory.mean_lmmse_error_rayleigh`, or a closure over a law's parameter. A weight of 0 gets
    exactly 0, as does any weight too small to be worth its power; weights that are all 0 inside jit get 1.

    The problem is convex; with f = `mean_error`, l_k > 0 satisfies w_k f'(l_k snr) = max_j w_j f'(l_max snr) and other
    weights lie below that price. Two nested bisections, on the largest load and on the others given it, take a fixed
    number of evaluations of f', so the function can be jitted and vmapped over weights and SNR. Without fading the
    loads are the closed form of K.-H. Lee and D. P. Petersen, "Optimal linear coding for vector channels", IEEE Trans.
    Commun. 24, 1976. Raises ValueError, outside jit, for weights or an SNR that are negative or not finite, or for
    weights that are all 0.
    """
    check("weights", weights, "finite, 0 or more and not all 0", lambda w: (w >= 0) & (w > 0).any())
    check("snr", snr, "finite and 0 or more", lambda value: value >= 0)
    weights, snr = jnp.asarray(weights, jnp.float32), jnp.asarray(snr, jnp.float32)
    first = jnp.argmax(weights)
    largest, is_first = weights[first], jnp.arange(weights.shape[0]) == first
    ratios = jnp.where(largest > 0, weights / jnp.where(largest > 0, largest, 1.0), 1.0)

    def benefit(load):
        """-f' at a load: what a little more power is worth, per unit of weight and SNR."""
        _, slope = jax.jvp(mean_error, (load * snr,), (jnp.ones_like(load),))
        return -slope

    def others(top):
        """Loads [m] when the largest weight's is `top`, so that the price is its benefit."""
        price = benefit(top)
        none = jnp.zeros_like(ratios)
        load, _ = bisect(lambda load: price - ratios * benefit(load), none, top, _INNER_STEPS)
        # A weight as large as the largest has its load, but its own gradient. Where even the first bit of power is not
        # worth its price there is no root.
        load = jnp.where(ratios < 1, load, with_gradient_of(load, jnp.full_like(load, top)))
        sent = (ratios == 1) | (ratios * benefit(none) > price)
        return jnp.where(is_first, top, jnp.where(sent, load, 0.0))

    top, _ = bisect(lambda top: jnp.mean(others(top)) - 1, jnp.float32(1), jnp.float32(weights.shape[0]), _OUTER_STEPS)
    load = others(top)
    return load / jnp.mean(load)
