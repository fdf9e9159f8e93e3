"""Policies that know the law of the gains, if anything, and not the gains."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.power.laws import LoadTable, gain_law, load_table, static_power
from megjax.power.policies.base import POLICIES, PowerPolicy
from megjax.power.problem import Problem, check_gains
from megjax.pytrees import pytree_dataclass


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


POLICIES.register(
    PowerPolicy(name="equal", title="equal power", version=1, rank=10, make=lambda fading, num_blocks: EqualPower())
)
POLICIES.register(
    PowerPolicy(
        name="static",
        title="static",
        version=1,
        rank=20,
        make=lambda fading, num_blocks: StaticPower(load_table(gain_law(fading, num_blocks))),
    )
)
POLICIES.register(
    PowerPolicy(name="codec", title="the codec's load", version=1, rank=30, make=lambda fading, num_blocks: None)
)
