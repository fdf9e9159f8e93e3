"""Power policies: from what the transmitter knows of the gains to the power of every block, all with one signature.

`policy.allocate(gains, problem) -> power [t]` takes the power gains |h_t|^2 as the transmitter knows them. A policy
whose `causal` is True decides block t from the gains up to t only; the others see the whole transmission in advance.
One transmission a call: the caller vmaps over gains, and over problems where needed; what depends on the problem alone
(loads, cut-offs) is then computed once. Every policy keeps sum p_t <= energy and p_t <= max_power; causal ones spend
what is left on the last block.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.channel import Fading
from megjax.channel.numerics import bisect, squared_magnitude, with_gradient_of
from megjax.configs import require
from megjax.keys import from_seed
from megjax.power.laws import GainLaw, LoadTable, static_power
from megjax.power.problem import Problem, check_gains, power_problem
from megjax.pytrees import pytree_dataclass

_BISECTIONS = 40
_THRESHOLDS = 128


@runtime_checkable
class Policy(Protocol):
    """What a power policy is; a pytree, so that it can be an argument of a jitted function."""

    causal: ClassVar[bool]

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """Power p_t of the blocks [t] for these known gains."""


def check_policy(policy: Policy, fading: Fading, num_blocks: int, max_power: float = math.inf) -> None:
    """ValueError unless a policy keeps to its contract on 32 drawn transmissions at each of -10, 0 and 20 dB.

    Powers [t] must be finite and 0 or more, none above `max_power`, with a sum of at most the energy, all but for
    rounding (1e-4); those of a `causal` policy must not depend on later gains. For use outside jit.
    """
    name, causal = type(policy).__name__, getattr(policy, "causal", None)
    require(isinstance(causal, bool), f"{name}.causal", causal, "True or False")
    keys = jax.random.split(from_seed(0), 32)
    gains = squared_magnitude(jax.jit(jax.vmap(lambda key: fading.sample(key, num_blocks)))(keys))
    allocate = jax.jit(jax.vmap(policy.allocate, (0, None)))
    first = num_blocks // 2
    changed = gains.at[:, first:].multiply(0.5)
    for snr_db in (-10.0, 0.0, 20.0):
        problem = power_problem(snr_db, num_blocks, max_power=max_power)
        power, energy = np.asarray(allocate(gains, problem)), float(problem.energy)
        require(power.shape == gains.shape, f"{name}.allocate's shape", power.shape[1:], f"({num_blocks},)")
        least, most, spent = (float(x) for x in (power.min(), power.max(), power.sum(1).max()))
        require(bool(np.all(np.isfinite(power))), f"{name}.allocate's powers", (least, most), "finite")
        require(least >= 0, f"{name}.allocate's smallest power", least, "0 or more")
        require(most <= 1.0001 * max_power, f"{name}.allocate's largest power", most, f"<= {max_power}")
        require(spent <= 1.0001 * energy, f"{name}.allocate's energy at {snr_db:g} dB", spent, f"at most {energy:g}")
        if causal:
            early = np.abs(np.asarray(allocate(changed, problem)) - power)[:, :first]
            looks = bool(early.size and early.max() > 1e-4 * energy)
            require(not looks, f"{name}.causal", True, "False, as its powers depend on later gains")


class View(NamedTuple):
    """What a causal policy sees before it sends block `block`: gains up to there (later ones are 0), energy left."""

    block: Int[Array, ""]
    gain: Float[Array, ""]
    gains: Float[Array, " t"]
    energy: Float[Array, ""]


def spend(
    decide: Callable[[View], Float[Array, ""]], gains: Float[Array, " t"], problem: Problem
) -> Float[Array, " t"]:
    """Powers [t] of a causal rule, cut to the energy left and the peak; the last block takes the rest.

    `decide` gets a `View` whose later gains are zeros, so that it cannot look ahead. ValueError for bad gains
    or another number of them than of weights.
    """
    check_gains(gains, problem)
    num_blocks = gains.shape[0]

    def step(energy, block):
        known = jnp.where(jnp.arange(num_blocks) <= block, gains, 0.0)
        wanted = decide(View(block, gains[block], known, energy))
        wanted = jnp.where(block == num_blocks - 1, energy, jnp.clip(wanted, 0.0, energy))
        power = jnp.minimum(wanted, problem.max_power)
        return jnp.maximum(energy - power, 0.0), power

    return jax.lax.scan(step, jnp.asarray(problem.energy, jnp.float32), jnp.arange(num_blocks))[1]


@pytree_dataclass
class EqualPower:
    """The same power in every block, whatever the gains and weights."""

    causal: ClassVar[bool] = True

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        check_gains(gains, problem)
        return jnp.minimum(jnp.full(gains.shape, problem.energy / gains.shape[0]), problem.max_power)


@pytree_dataclass
class StaticPower:
    """Open loop: the powers that minimise sum w_t E[1 / (1 + p_t g snr)], from the law of the gains alone."""

    causal: ClassVar[bool] = True
    table: LoadTable

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`; the same for all gains."""
        check_gains(gains, problem)
        return static_power(self.table, problem.weights, problem.snr, problem.energy, problem.max_power)


@pytree_dataclass
class LoadedPower:
    """Open loop with given loads [t], such as the codec's own: p_t in proportion to them."""

    causal: ClassVar[bool] = True
    load: Float[Array, " t"]

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`; ValueError for a load of another length."""
        check_gains(gains, problem)
        if self.load.shape != gains.shape:
            raise ValueError(f"load has shape {self.load.shape}; it must be {gains.shape}, one for each block")
        return jnp.minimum(problem.energy * self.load / jnp.sum(self.load), problem.max_power)


@pytree_dataclass
class ChannelInversion:
    """Truncated inversion: p_t = c / g_t, zero below a threshold, with c for the mean power under the law.

    Of 128 thresholds it takes the one with the least P(g < threshold) + P(g >= threshold) / (1 + c snr), the mean error
    of an unweighted block. A. J. Goldsmith and P. P. Varaiya, "Capacity of fading channels with channel side
    information", IEEE Trans. Inf. Theory 43(6), 1997, section III.
    """

    causal: ClassVar[bool] = True
    law: GainLaw

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        nodes, probabilities = self.law
        thresholds = jnp.interp(
            jnp.linspace(0, 1, _THRESHOLDS, endpoint=False, dtype=jnp.float32), jnp.cumsum(probabilities), nodes
        )
        sent = nodes[None] >= thresholds[:, None]
        inverse = self.law.mean(jnp.where(sent, 1 / jnp.maximum(nodes, 1e-20), 0.0))
        level, share = problem.energy / gains.shape[0] / inverse, self.law.mean(jnp.where(sent, 1.0, 0.0))
        best = jnp.argmin(1 - share + share / (1 + level * problem.snr))
        chosen, power = thresholds[best], level[best]
        return spend(
            lambda view: jnp.where(view.gain >= chosen, power / jnp.maximum(view.gain, 1e-20), 0.0), gains, problem
        )


@pytree_dataclass
class Waterfilling:
    """Water-filling over time: p_t = (1 / gamma0 - sigma^2 / g_t)+, gamma0 for the mean power under the law.

    It maximises the ergodic capacity, not this problem's error. A. J. Goldsmith and P. P. Varaiya, "Capacity of fading
    channels with channel side information", IEEE Trans. Inf. Theory 43(6), 1997, eq. 5; here cut at the energy left.
    """

    causal: ClassVar[bool] = True
    law: GainLaw

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`."""
        mean_power = problem.energy / gains.shape[0]
        floors = 1 / (problem.snr * self.law.gains)

        def excess(level):
            return self.law.mean(jnp.maximum(level - floors, 0.0)) - mean_power

        # E(level - floor)+ >= mean_power once blocks of the best gains, of probability q, lie mean_power / q below it.
        share = jnp.cumsum(self.law.probabilities[::-1])[::-1]
        highest = jnp.min(floors + mean_power / share)
        level, _ = bisect(excess, floors[-1], highest, _BISECTIONS)
        floor = lambda gain: 1 / (problem.snr * jnp.maximum(gain, 1e-20))  # noqa: E731
        return spend(lambda view: jnp.maximum(level - floor(view.gain), 0.0), gains, problem)


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
