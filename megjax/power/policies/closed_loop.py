"""Causal rules that know the law of the gains and the gain of the block at hand."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.numerics import bisect
from megjax.power.laws import GainLaw, gain_law
from megjax.power.policies.base import POLICIES, PowerPolicy, spend
from megjax.power.problem import Problem
from megjax.pytrees import pytree_dataclass

_BISECTIONS = 40
_THRESHOLDS = 128


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

        def decide(view):
            return jnp.maximum(level - 1 / (problem.snr * jnp.maximum(view.gain, 1e-20)), 0.0)

        return spend(decide, gains, problem)


POLICIES.register(
    PowerPolicy(
        name="inversion",
        title="channel inversion",
        version=1,
        rank=40,
        make=lambda fading, num_blocks: ChannelInversion(gain_law(fading, num_blocks)),
    )
)
POLICIES.register(
    PowerPolicy(
        name="waterfilling",
        title="water-filling",
        version=1,
        rank=50,
        make=lambda fading, num_blocks: Waterfilling(gain_law(fading, num_blocks)),
    )
)
