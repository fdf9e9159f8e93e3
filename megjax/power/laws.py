"""Laws of a block's power gain g = |h|^2 as quadrature nodes, and the loads that are best given the law alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from megjax.channel import Fading
from megjax.keys import from_seed
from megjax.numerics import bisect, cubic_interpolation, squared_magnitude, with_gradient_of
from megjax.power.problem import check_num_blocks
from megjax.precision import exact_matmul

NUM_NODES = 192
_LOG_RANGE = -20.0, 3.7
"""Logarithms of the gains between which a law of mean 1 is integrated."""
_SAMPLES, _SAMPLE_NODES = 2**17, 2**10
TABLE_SIZE, _TABLE_STEP = 512, 0.08
_BISECTIONS = 50
_PRICE_BISECTIONS = 24
"""Halvings of the range of prices, 41 in their logarithm, to 2e-6; the share of the energy corrects the rest."""


class GainLaw(NamedTuple):
    """Gains g [n] of a block, ascending, and their probabilities [n]: expectations are sums over both."""

    gains: Float[Array, " n"]
    probabilities: Float[Array, " n"]

    def mean(self, values: Float[Array, "*s n"]) -> Float[Array, "*s"]:
        """E[f(g)] from the values of f at the nodes."""
        return exact_matmul(values, self.probabilities)


def gain_law(fading: Fading, num_blocks: int = 16) -> GainLaw:
    """The law of one block's gain under `fading`; for use outside jit.

    A law with a `gain_log_density` is integrated by the trapezoidal rule in ln g, which converges geometrically for
    smooth integrands. Of any other it takes 2^17 samples, averaged over its first `num_blocks` blocks, in 1,024
    intervals of equal probability. ValueError for fewer than one block.
    """
    check_num_blocks(num_blocks)
    density = getattr(fading, "gain_log_density", None)
    if density is None:
        return _sampled(fading, num_blocks)
    log_gains = np.linspace(*_LOG_RANGE, NUM_NODES)
    gains = np.exp(log_gains)
    logits = density(gains) + log_gains
    weights = np.exp(logits - logits.max())
    return GainLaw(jnp.asarray(gains, jnp.float32), jnp.asarray(weights / weights.sum(), jnp.float32))


def _sampled(fading: Fading, num_blocks: int) -> GainLaw:
    keys = jax.random.split(from_seed(0), -(-_SAMPLES // num_blocks))
    sample = jax.jit(jax.vmap(lambda key: squared_magnitude(fading.sample(key, num_blocks))))
    gains = np.sort(np.asarray(sample(keys)).reshape(-1)[:_SAMPLES])
    if gains[0] == gains[-1]:
        return GainLaw(jnp.asarray(gains[:1]), jnp.ones(1, jnp.float32))
    nodes = gains.reshape(_SAMPLE_NODES, -1).mean(1)
    return GainLaw(jnp.asarray(nodes), jnp.full(_SAMPLE_NODES, np.float32(1 / _SAMPLE_NODES)))


class LoadTable(NamedTuple):
    """ln(1 + x) [n] at which the mean error E[1 / (1 + x g)] falls by exp(-y) E[g] per unit of x, y = 0, step, ...

    The inverse of the marginal benefit of SNR, tabulated once for a law, so that loads cost interpolations only.
    """

    log_snr: Float[Array, " n"]
    log_mean_gain: Float[Array, ""]


def load_table(law: GainLaw) -> LoadTable:
    """The table of a law of the gain, for x up to about 10^12."""
    gains, probabilities = law
    mean_gain = jnp.sum(gains * probabilities)
    levels = _TABLE_STEP * jnp.arange(TABLE_SIZE, dtype=jnp.float32)

    def log_benefit(log_snr):
        """ln of -d/dx E[1 / (1 + x g)] / E[g] at x = exp(log_snr) - 1."""
        damped = gains[None] / jnp.square(1 + jnp.expm1(log_snr)[:, None] * gains[None])
        return jnp.log(exact_matmul(damped, probabilities) / mean_gain)

    # The benefit falls, so that it rises with the negative logarithm.
    _, (_, end) = bisect(lambda x: levels + log_benefit(-x), jnp.float32(-28), jnp.zeros_like(levels), _BISECTIONS)
    return LoadTable((-end).at[0].set(0.0), jnp.log(mean_gain))


def static_power(
    table: LoadTable,
    weights: Float[Array, " t"],
    snr: Float[ArrayLike, ""],
    energy: Float[ArrayLike, ""],
    max_power: Float[ArrayLike, ""] = jnp.inf,
) -> Float[Array, " t"]:
    """Powers [t] of sum `energy` that minimise sum_t w_t E[1 / (1 + p_t g snr)], each at most `max_power`.

    `snr` is the linear 1 / sigma^2. The optimal open loop: every block that gets power has the same marginal benefit,
    w_t snr E[g / (1 + p_t g snr)^2], whose level is found by bisection (K.-H. Lee and D. P. Petersen, "Optimal linear
    coding for vector channels", IEEE Trans. Commun. 24, 1976, with fading). Blocks of weight 0 get nothing; if the
    others cannot take the energy, some is left unspent.
    """
    log_worth = jnp.log(jnp.maximum(weights, 1e-30)) + jnp.log(snr) + table.log_mean_gain
    highest = jnp.max(log_worth)
    useful = weights > 0

    def power(log_price):
        load = jnp.expm1(cubic_interpolation(table.log_snr, (log_worth - log_price) / _TABLE_STEP)) / snr
        return jnp.where(useful, jnp.minimum(load, max_power), 0.0)

    lowest = highest - (TABLE_SIZE - 1) * _TABLE_STEP
    price, (_, affordable) = bisect(
        lambda log_price: energy - jnp.sum(power(log_price)), lowest, highest, _PRICE_BISECTIONS
    )
    spent = with_gradient_of(power(price), power(affordable))
    # What rounding left over goes to all in proportion, as far as the peak allows.
    total = jnp.sum(spent)
    return jnp.minimum(spent * (energy / jnp.where(total > 0, total, 1.0)), max_power)


def mean_error(law: GainLaw, snr: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """E[1 / (1 + snr g)], elementwise."""
    gains = jnp.reshape(law.gains, (1,) * snr.ndim + (-1,))
    return law.mean(1 / (1 + snr[..., None] * gains))
