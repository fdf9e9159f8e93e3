"""Dynamic programming: the causal optimum of power control, for independent and for Markov fading.

Write J_t(e) for the least expected error of blocks t, t+1, ... with energy e, before g_t is known. It is convex and
decreasing; with price lambda_t(e) = -J_t'(e), the best power in block t of gain g solves

    w_t g snr / (1 + p g snr)^2 = lambda_{t+1}(e - p),   0 <= p <= min(e, p_max),

and by the envelope theorem lambda_t(e) is the expectation over g of lambda_{t+1}(e - p), or of block t's own benefit
where p = e. So the recursion runs on prices alone, and the power is a root, not a search over a grid of actions. The
recursion is that of D. P. Bertsekas, "Dynamic Programming and Optimal Control", vol. 1, 2017, section 1.3.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megjax.channel import Fading
from megjax.channel.fading import DEPENDENCES
from megjax.configs import require
from megjax.numerics import bisect
from megjax.power.laws import GainLaw, gain_law
from megjax.power.policies.base import POLICIES, PowerPolicy, spend
from megjax.power.problem import Problem
from megjax.precision import exact_matmul
from megjax.pytrees import pytree_dataclass

ENERGIES = 193
"""Grid points of the energy left, cubic from 0 to all of it."""
MARKOV_GAINS, LARGEST_AMPLITUDE = 160, 4.0
"""Grid points of |h| for Gauss-Markov fading, and where they end (P(|h| > 4) = 1e-7)."""
LEAST_DEVIATION = 3.6
"""Deviation of |h_{t+1}| given |h_t|, in steps of that grid, below which the grid is too coarse for the transition law:
a correlation beyond 0.98 of Gauss-Markov fading."""
_BISECTIONS = 26
_LEAST_PRICE = 1e-30


class MarkovLaw(NamedTuple):
    """A Markov chain of gains on midpoints of equal steps of |h|: gains [m], stationary [m], transitions [m m]."""

    gains: Float[Array, " m"]
    stationary: Float[Array, " m"]
    transitions: Float[Array, "m m"]


def markov_law(fading: Fading) -> MarkovLaw:
    """The chain of |h_t|^2 under a law with `gain_log_density` and `transition_log_density`.

    ValueError for a law without them, or one whose |h_t| moves by less from block to block than the grid resolves.
    """
    methods = [getattr(fading, name, None) for name in ("gain_log_density", "transition_log_density")]
    require(None not in methods, "fading", fading, "a law with gain_log_density and transition_log_density")
    step = LARGEST_AMPLITUDE / MARKOV_GAINS
    amplitude = step * (np.arange(MARKOV_GAINS) + 0.5)
    gains = amplitude**2
    log_stationary, log_transitions = methods[0](gains), methods[1](gains[:, None], gains[None])
    stationary = amplitude * np.exp(log_stationary - log_stationary.max())
    transitions = amplitude[None] * np.exp(log_transitions - log_transitions.max(1, keepdims=True))
    transitions /= transitions.sum(1, keepdims=True)
    deviation = float(np.sqrt(transitions @ gains - (transitions @ amplitude) ** 2).min() / step)
    allowed = f"{LEAST_DEVIATION} or more for dynamic programming"
    require(deviation >= LEAST_DEVIATION, "fading's deviation of |h| given the block before", deviation, allowed)
    return MarkovLaw(*(jnp.asarray(x, jnp.float32) for x in (gains, stationary / stationary.sum(), transitions)))


@pytree_dataclass
class CausalOptimum:
    """The causal optimum by dynamic programming over energy and gain; `law` is that of `causal_optimum`.

    `allocate` solves the problem first, which under vmap over gains happens once; `prices` does it apart.
    """

    causal: ClassVar[bool] = True
    law: GainLaw | MarkovLaw

    def prices(self, problem: Problem) -> Float[Array, "t e m"]:
        """ln lambda_{t+1}(e) given g_t, after block t, on the grid of energies (m is 1 for independent gains).

        After the last block energy is worth nothing.
        """
        return _prices(self.law, problem)

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        prices = self.prices(problem)

        def decide(view):
            column = self._column(view.gain, prices[view.block])
            useful = _useful(problem, problem.num_blocks - 1 - view.block)
            return _best_power(problem, problem.weights[view.block], view.gain, view.energy, column, useful)

        return spend(decide, gains, problem)

    def power_at(
        self, gain: Float[Array, ""], energy: Float[Array, ""], block: int, problem: Problem
    ) -> Float[Array, ""]:
        """Power of block `block` (from 0) of this gain with this energy left."""
        column = self._column(gain, self.prices(problem)[block])
        useful = _useful(problem, problem.num_blocks - 1 - block)
        return _best_power(problem, problem.weights[block], gain, energy, column, useful)

    def expected_return(self, problem: Problem) -> Float[Array, ""]:
        """-J_1(energy), by quadrature over the grids: the value of the optimum without simulation.

        The price is integrated over the energy, from -sum of the weights without any; accurate to about 1e-3,
        somewhat less with a peak if the law has few gains, as the price then jumps.
        """
        first = _first_prices(self.law, problem)
        energies = _energy_grid(_useful(problem, problem.num_blocks))
        return -jnp.sum(problem.weights) + jnp.trapezoid(first, energies)

    def _column(self, gain, table: Float[Array, "e m"]) -> Float[Array, " e"]:
        if not isinstance(self.law, MarkovLaw):
            return table[:, 0]
        step = LARGEST_AMPLITUDE / MARKOV_GAINS
        place = jnp.clip(jnp.sqrt(gain) / step - 0.5, 0, MARKOV_GAINS - 1.001)
        index = place.astype(jnp.int32)
        return table[:, index] + (place - index.astype(place.dtype)) * (table[:, index + 1] - table[:, index])


def causal_optimum(fading: Fading, num_blocks: int = 16) -> CausalOptimum:
    """The causal optimum for gains that are independent or a Markov chain of known transitions; for use outside jit.

    ValueError for a law that does not say so of its blocks (`Fading.dependence`), such as Jakes fading, OFDM and
    shadowing, for which no such recursion holds.
    """
    dependence = getattr(fading, "dependence", None)
    stated = dependence in DEPENDENCES
    require(stated, f"{type(fading).__name__}.dependence", dependence, f"one of {DEPENDENCES}, how its blocks depend")
    require(dependence != "other", "fading", fading, "independent from block to block, or Markov such as Gauss-Markov")
    return CausalOptimum(markov_law(fading) if dependence == "markov" else gain_law(fading, num_blocks))


POLICIES.register(PowerPolicy(name="dp", title="causal optimum", version=1, rank=80, make=causal_optimum))


def _useful(problem: Problem, blocks_left) -> Array:
    """The most energy that so many blocks can spend under the peak; beyond it energy is worth nothing."""
    most = jnp.asarray(blocks_left, jnp.float32) * problem.max_power
    return jnp.where(blocks_left > 0, jnp.minimum(problem.energy, most), 0.0)


def _energy_grid(useful: Float[Array, ""]) -> Float[Array, " e"]:
    return useful * (jnp.arange(ENERGIES, dtype=jnp.float32) / (ENERGIES - 1)) ** 3


def _price_at(energy: Array, log_prices: Float[Array, " e"], useful: Float[Array, ""]) -> Array:
    """lambda at an energy between the grid points, ln lambda being linear in the cube root; 0 beyond the useful."""
    share = energy / jnp.where(useful > 0, useful, 1.0)
    place = jnp.where(share > 0, jnp.cbrt(jnp.where(share > 0, share, 1.0)), 0.0) * (ENERGIES - 1)
    place = jnp.clip(place, 0, ENERGIES - 1.001)
    index = place.astype(jnp.int32)
    left, right = log_prices[index], log_prices[index + 1]
    return jnp.where(energy <= useful, jnp.exp(left + (place - index.astype(place.dtype)) * (right - left)), 0.0)


def _benefit(problem: Problem, weight, gain, power) -> Array:
    """What a unit of power more is worth in a block."""
    slope = gain * problem.snr
    return weight * slope / jnp.square(1 + power * slope)


def _best_power(problem: Problem, weight, gain, energy, log_prices: Float[Array, " e"], useful) -> Array:
    """Root p of: benefit of block t at p = price of what is left, between 0 and min(energy, max_power)."""

    def excess(power):
        return _price_at(energy - power, log_prices, useful) - _benefit(problem, weight, gain, power)

    highest = jnp.minimum(energy, problem.max_power)
    power, (low, high) = bisect(excess, jnp.zeros_like(highest), highest, _BISECTIONS)
    # A bisection that ends where it began found no root there.
    return jnp.where(low > 0, jnp.where(high < highest, power, highest), 0.0)


def _stage(
    law, problem: Problem, weight: Array, blocks_after: Array, after: Float[Array, "e m"]
) -> Float[Array, "e n"]:
    """Price of energy in block t once its gain is known, lambda_t(e | g) [e n], from ln lambda_{t+1}(e | g)."""
    useful, most = _useful(problem, blocks_after), _useful(problem, blocks_after + 1)

    def price(energy, gain, column):
        power = _best_power(problem, weight, gain, energy, column, useful)
        own, later = _benefit(problem, weight, gain, power), _price_at(energy - power, column, useful)
        # Inside, both are equal, or the rest can take no more and this block has to; at no power or the peak the
        # block's benefit is not the price. Without energy, its first bit is worth the larger of the two.
        price = jnp.where(power > 1e-6 * energy, own, jnp.maximum(own, later))
        # With just enough for every block's peak, a little less would be taken from the block that loses least.
        full = jnp.where(blocks_after > 0, jnp.minimum(own, later), own)
        at_peak = jnp.where(energy > (1 - 1e-6) * most, full, later)
        return jnp.where(power > (1 - 1e-6) * problem.max_power, at_peak, price)

    over_gains = jax.vmap(price, (None, 0, 0))
    columns = jnp.broadcast_to(after, (ENERGIES, law.gains.shape[0])).T
    return jax.vmap(over_gains, (0, None, None))(_energy_grid(most), law.gains, columns)


def _before(law, priced: Float[Array, "e n"]) -> Float[Array, "e m"]:
    """Expectation over the block's gain, given the gain before it where gains are a Markov chain."""
    if isinstance(law, MarkovLaw):
        return exact_matmul(priced, law.transitions.T)
    return exact_matmul(priced, law.probabilities)[:, None]


def _prices(law, problem: Problem) -> Float[Array, "t e m"]:
    columns = law.gains.shape[0] if isinstance(law, MarkovLaw) else 1
    last = jnp.full((ENERGIES, columns), np.float32(np.log(_LEAST_PRICE)))

    def back(after, block):
        weight, blocks_after = block
        priced = _before(law, _stage(law, problem, weight, blocks_after, after))
        return jnp.log(jnp.maximum(priced, _LEAST_PRICE)), after

    counts = jnp.arange(problem.num_blocks)[::-1]
    return jax.lax.scan(back, last, (problem.weights, counts), reverse=True)[1]


def _first_prices(law, problem: Problem) -> Float[Array, " e"]:
    """lambda_1(e) [e], before the first gain is known."""
    priced = _stage(law, problem, problem.weights[0], jnp.asarray(problem.num_blocks - 1), _prices(law, problem)[0])
    probabilities = law.stationary if isinstance(law, MarkovLaw) else law.probabilities
    return exact_matmul(priced, probabilities)
