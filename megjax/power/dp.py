"""Dynamic programming: the causal optimum of power control, for independent and for Gauss-Markov Rayleigh fading.

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
from jax.scipy.special import i0e
from jaxtyping import Array, Float

from megjax.channel import OFDM, Fading, GaussMarkovFading, JakesFading, ShadowedFading
from megjax.configs import require
from megjax.power.laws import GainLaw, gain_law
from megjax.power.policies import policy, spend
from megjax.power.problem import Problem

ENERGIES = 193
"""Grid points of the energy left, cubic from 0 to all of it."""
MARKOV_GAINS, LARGEST_AMPLITUDE = 160, 4.0
"""Grid points of |h| for Gauss-Markov fading, and where they end (P(|h| > 4) = 1e-7)."""
LARGEST_RHO = 0.98
"""Beyond it the grid of gains is too coarse for the transition law."""
_BISECTIONS = 26
_LEAST_PRICE = 1e-30


class MarkovLaw(NamedTuple):
    """A Markov chain of gains on midpoints of equal steps of |h|: gains [m], stationary [m], transitions [m m]."""

    gains: Float[Array, " m"]
    stationary: Float[Array, " m"]
    transitions: Float[Array, "m m"]


def markov_law(fading: GaussMarkovFading) -> MarkovLaw:
    """The chain of |h_t|^2 under Gauss-Markov fading: given |h_t|^2 = g, |h_{t+1}|^2 is noncentral chi-squared.

    Its density is exp(-(x + r g) / (1 - r)) I0(2 sqrt(r g x) / (1 - r)) / (1 - r), r = rho^2. ValueError for |rho|
    above 0.98, which the grid does not resolve.
    """
    rho = float(fading.rho)
    require(abs(rho) <= LARGEST_RHO, "rho", rho, f"within +-{LARGEST_RHO} for dynamic programming")
    step = LARGEST_AMPLITUDE / MARKOV_GAINS
    amplitude = step * (np.arange(MARKOV_GAINS) + 0.5)
    gains, r = amplitude**2, rho**2
    before, after = gains[:, None], gains[None]
    argument = 2 * np.sqrt(r * before * after) / (1 - r)
    log_density = argument - (after + r * before) / (1 - r) + np.log(np.asarray(i0e(argument), np.float64))
    transitions = amplitude[None] * np.exp(log_density)
    transitions /= transitions.sum(1, keepdims=True)
    stationary = amplitude * np.exp(-gains)
    return MarkovLaw(*(jnp.asarray(x, jnp.float32) for x in (gains, stationary / stationary.sum(), transitions)))


@policy
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
            return _best_power(problem, problem.weights[view.block], view.gain, view.energy, column)

        return spend(decide, gains, problem)

    def power_at(
        self, gain: Float[Array, ""], energy: Float[Array, ""], block: int, problem: Problem
    ) -> Float[Array, ""]:
        """Power of block `block` (from 0) of this gain with this energy left."""
        column = self._column(gain, self.prices(problem)[block])
        return _best_power(problem, problem.weights[block], gain, energy, column)

    def expected_return(self, problem: Problem) -> Float[Array, ""]:
        """-J_1(energy), by quadrature over the grids: the value of the optimum without simulation.

        The price is integrated over the energy, from -sum of the weights without any; accurate to about 1e-3.
        """
        first = _first_prices(self.law, problem)
        energies = _energy_grid(problem)
        return -jnp.sum(problem.weights) + jnp.trapezoid(first, energies)

    def _column(self, gain, table: Float[Array, "e m"]) -> Float[Array, " e"]:
        if not isinstance(self.law, MarkovLaw):
            return table[:, 0]
        step = LARGEST_AMPLITUDE / MARKOV_GAINS
        place = jnp.clip(jnp.sqrt(gain) / step - 0.5, 0, MARKOV_GAINS - 1.001)
        index = place.astype(jnp.int32)
        return table[:, index] + (place - index) * (table[:, index + 1] - table[:, index])


def causal_optimum(fading: Fading, num_blocks: int = 16) -> CausalOptimum:
    """The causal optimum for independent gains or for Gauss-Markov Rayleigh fading; for use outside jit.

    ValueError for Jakes fading, OFDM and shadowing, whose gains depend on one another but are not a Markov chain, so
    that no such recursion holds; other models are taken for independent from block to block.
    """
    chained = isinstance(fading, JakesFading | OFDM | ShadowedFading)
    require(not chained, "fading", fading, "independent from block to block or Gauss-Markov")
    if isinstance(fading, GaussMarkovFading) and float(fading.rho) != 0:
        return CausalOptimum(markov_law(fading))
    return CausalOptimum(gain_law(fading, num_blocks))


def _energy_grid(problem: Problem) -> Float[Array, " e"]:
    return problem.energy * (jnp.arange(ENERGIES) / (ENERGIES - 1)) ** 3


def _price_at(problem: Problem, energy: Array, log_prices: Float[Array, " e"]) -> Array:
    """lambda at an energy between the grid points, ln lambda being linear in the cube root."""
    place = jnp.clip(jnp.cbrt(jnp.maximum(energy, 0.0) / problem.energy) * (ENERGIES - 1), 0, ENERGIES - 1.001)
    index = place.astype(jnp.int32)
    left, right = log_prices[index], log_prices[index + 1]
    return jnp.exp(left + (place - index) * (right - left))


def _best_power(problem: Problem, weight, gain, energy, log_prices: Float[Array, " e"]) -> Array:
    """Root p of: benefit of block t at p = price of what is left, between 0 and min(energy, max_power)."""
    slope = gain * problem.snr

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        worthwhile = weight * slope / jnp.square(1 + middle * slope) > _price_at(problem, energy - middle, log_prices)
        return jnp.where(worthwhile, middle, low), jnp.where(worthwhile, high, middle)

    highest = jnp.minimum(energy, problem.max_power)
    return sum(jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(highest), highest))) / 2


def _stage(law, problem: Problem, weight: Array, after: Float[Array, "e m"]) -> Float[Array, "e n"]:
    """Price of energy in block t once its gain is known, lambda_t(e | g) [e n], from ln lambda_{t+1}(e | g)."""
    energies = _energy_grid(problem)

    def price(energy, gain, column):
        power = _best_power(problem, weight, gain, energy, column)
        slope = gain * problem.snr
        own = weight * slope / jnp.square(1 + energy * slope)
        own = jnp.where(energy < problem.max_power, own, 0.0)
        # Where all of the energy is spent, its price is what block t makes of it; it is then above lambda_{t+1}(0).
        return jnp.maximum(_price_at(problem, energy - power, column), own)

    over_gains = jax.vmap(price, (None, 0, 0))
    columns = jnp.broadcast_to(after, (ENERGIES, law.gains.shape[0])).T
    return jax.vmap(over_gains, (0, None, None))(energies, law.gains, columns)


def _before(law, priced: Float[Array, "e n"]) -> Float[Array, "e m"]:
    """Expectation over the block's gain, given the gain before it where gains are a Markov chain."""
    if isinstance(law, MarkovLaw):
        return priced @ law.transitions.T
    return (priced @ law.probabilities)[:, None]


def _prices(law, problem: Problem) -> Float[Array, "t e m"]:
    columns = law.gains.shape[0] if isinstance(law, MarkovLaw) else 1
    last = jnp.full((ENERGIES, columns), np.float32(np.log(_LEAST_PRICE)))

    def back(after, weight):
        before = jnp.log(jnp.maximum(_before(law, _stage(law, problem, weight, after)), _LEAST_PRICE))
        return before, after

    return jax.lax.scan(back, last, problem.weights, reverse=True)[1]


def _first_prices(law, problem: Problem) -> Float[Array, " e"]:
    """lambda_1(e) [e], before the first gain is known."""
    priced = _stage(law, problem, problem.weights[0], _prices(law, problem)[0])
    probabilities = law.stationary if isinstance(law, MarkovLaw) else law.probabilities
    return priced @ probabilities
