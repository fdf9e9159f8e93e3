"""Optima for gains that are all known in advance, which bound what any policy can reach."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.numerics import bisect, with_gradient_of
from megjax.power.policies.base import POLICIES, PowerPolicy
from megjax.power.problem import Problem, check_gains
from megjax.pytrees import pytree_dataclass

_BISECTIONS = 40


@pytree_dataclass
class ClairvoyantWaterfilling:
    """Water-filling over the gains of this transmission, all known in advance: the most capacity, not the least error.

    T. M. Cover and J. A. Thomas, "Elements of Information Theory", 2nd ed., 2006, section 9.4.
    """

    causal: ClassVar[bool] = False

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        check_gains(gains, problem)
        usable = gains > 0
        floors = 1 / (problem.snr * jnp.maximum(gains, 1e-20))
        floors = floors - jnp.min(floors)

        def power(log_level):
            return jnp.where(usable, jnp.clip(jnp.exp(log_level) - floors, 0.0, problem.max_power), 0.0)

        # The level above the deepest floor is at least the mean power, and without a peak at most all of the energy;
        # with one it may have to rise above a block in a deep fade, hence the bisection of its logarithm.
        highest = jnp.max(jnp.where(usable, floors, 0.0)) + problem.max_power
        low, high = jnp.log(problem.energy / gains.shape[0]), jnp.log(problem.energy)
        high = jnp.where(jnp.isfinite(highest), jnp.maximum(high, jnp.log(highest)), high)
        level, (low, high) = bisect(lambda x: jnp.sum(power(x)) - problem.energy, low, high, _BISECTIONS)
        return _spending_all(power(level), power(low), power(high), problem)


@pytree_dataclass
class Clairvoyant:
    """The least sum w_t / (1 + p_t g_t snr) for gains known in advance: no policy does better on any transmission.

    p_t = (sqrt(w_t g_t snr / price) - 1)+ / (g_t snr), cut at the peak, the price found by bisection: the optimality
    conditions of S. Boyd and L. Vandenberghe, "Convex Optimization", 2004, section 5.5.
    """

    causal: ClassVar[bool] = False

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        check_gains(gains, problem)
        useful = (gains > 0) & (problem.weights > 0)
        slope = jnp.maximum(gains * problem.snr, 1e-20)
        log_worth = jnp.log(jnp.maximum(problem.weights * slope, 1e-30))

        def power(log_price):
            level = jnp.expm1(jnp.maximum(0.5 * (log_worth - log_price), 0.0)) / slope
            return jnp.where(useful, jnp.minimum(level, problem.max_power), 0.0)

        highest = jnp.max(log_worth)
        price, (low, high) = bisect(lambda x: problem.energy - jnp.sum(power(x)), highest - 90.0, highest, _BISECTIONS)
        return _spending_all(power(price), power(high), power(low), problem)


def _spending_all(
    powers: Float[Array, " t"], least: Float[Array, " t"], most: Float[Array, " t"], problem: Problem
) -> Float[Array, " t"]:
    """Powers between those at the ends of a bisection that spend the energy where they can: rounding keeps ends apart.

    Their gradient is that of `powers`, at the root.
    """
    missing, gap = problem.energy - jnp.sum(least), jnp.sum(most - least)
    exact = least + jnp.clip(missing / jnp.where(gap > 0, gap, 1.0), 0.0, 1.0) * (most - least)
    return with_gradient_of(powers, exact)


POLICIES.register(
    PowerPolicy(
        name="waterfilling_clairvoyant",
        title="clairvoyant water-filling",
        version=1,
        rank=60,
        make=lambda fading, num_blocks: ClairvoyantWaterfilling(),
    )
)
POLICIES.register(
    PowerPolicy(
        name="clairvoyant", title="clairvoyant", version=1, rank=70, make=lambda fading, num_blocks: Clairvoyant()
    )
)
