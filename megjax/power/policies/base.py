"""Power policies: from what the transmitter knows of the gains to the power of every block, all with one signature.

`policy.allocate(gains, problem) -> power [t]` takes the power gains |h_t|^2 as the transmitter knows them. A policy
whose `causal` is True decides block t from the gains up to t only; the others see the whole transmission in advance.
One transmission a call: the caller vmaps over gains, and over problems where needed; what depends on the problem alone
(loads, cut-offs) is then computed once. Every policy keeps sum p_t <= energy and p_t <= max_power; causal ones spend
what is left on the last block.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.channel import Fading
from megjax.configs import require
from megjax.keys import from_seed
from megjax.numerics import squared_magnitude
from megjax.power.problem import Problem, check_gains, pay, power_problem
from megjax.registry import Record, Registry


@runtime_checkable
class Policy(Protocol):
    """What a power policy is; a pytree, so that it can be an argument of a jitted function."""

    causal: ClassVar[bool]

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """Power p_t of the blocks [t] for these known gains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerPolicy(Record):
    """A policy by name, such as "static", or by name and parameter, such as "ppo:runs/power/model"."""

    make: Callable[..., Policy | None]
    """`make(fading, num_blocks)`, with the parameter as third argument if one is given. None stands for the load that
    comes with a code."""
    parameter: str | None = None
    """What may follow the colon; None for a policy without a parameter."""
    trained: bool = False
    """Whether the policy has weights of its own, which sweeps file results under too."""


POLICIES: Registry[PowerPolicy] = Registry("power policy", "megjax.power.policies", "megjax.policies")


def find_policy(name: str, setting: str = "policy") -> tuple[PowerPolicy, tuple[str, ...]]:
    """The record of a policy such as "static" or "ppo:FOLDER", and its parameter, if any, as a tuple.

    ValueError naming the setting for an unknown name or a parameter that the policy does not have.
    """
    plain, colon, parameter = name.partition(":")
    policy = POLICIES.find(plain, setting)
    fits = bool(parameter and policy.parameter) if colon else True
    require(fits, setting, name, f"{plain}:{policy.parameter}" if policy.parameter else f"{plain} alone")
    return policy, (parameter,) if colon else ()


def make_policy(name: str, fading: Fading, num_blocks: int = 16) -> Policy | None:
    """The policy of this name for a law of fading; None for "codec", the load that comes with a code.

    "ppo" is the bundled policy, "ppo:FOLDER" that of `LearnedPower.save_pretrained`. For use outside jit. ValueError
    for an unknown name, "dp" on fading that has none, or a trained policy that does not fit.
    """
    policy, parameter = find_policy(name)
    return policy.make(fading, num_blocks, *parameter)


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
        return pay(energy, wanted, problem.max_power)

    return jax.lax.scan(step, jnp.asarray(problem.energy, jnp.float32), jnp.arange(num_blocks))[1]
