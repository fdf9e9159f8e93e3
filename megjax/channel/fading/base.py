"""What a law of block fading is, and the table of the laws that can be asked for by name."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Array, Complex, Key

from megjax.configs import require
from megjax.registry import Record, Registry

DEPENDENCES = ("independent", "markov", "other")


@runtime_checkable
class Fading(Protocol):
    """Anything that draws the gains of one transmission.

    `dependence`, one of `DEPENDENCES`, says how the power gains |h_t|^2 of different blocks depend on each other:

    - "independent": not at all.
    - "markov": given |h_t|^2, later ones do not depend on earlier ones.
    - "other": in some other way.

    Three methods are optional. The first two make tables of power control exact; they take and return arrays of one
    shape, and are called outside jit:

    - `gain_log_density(gains)`: logarithm of the density of a block's |h_t|^2, up to a constant.
    - `transition_log_density(before, after)`: logarithm of the density of |h_{t+1}|^2 = after given |h_t|^2 = before,
      up to a constant for each `before`; of laws whose dependence is "markov".
    - `mean_lmmse_error(snr)`, static: E[1 / (1 + snr |h_t|^2)], elementwise, for loads that are best for the law.
    """

    dependence: ClassVar[str]

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Complex gains [t] of `num_blocks` consecutive blocks, one realisation; the caller vmaps over keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FadingLaw(Record):
    """A law by name, such as "rayleigh", or by name and parameter, such as "rician:6"."""

    make: Callable[..., Fading]
    """The law, from its parameter if it has one."""
    parameter: str | None = None
    """What the number after the colon means, with its unit; None for a law without one."""


FADINGS: Registry[FadingLaw] = Registry("fading law", "megjax.channel.fading", "megjax.fadings")


def find_fading(name: str, setting: str = "fading", others: str = "") -> Fading:
    """The law of a name such as "rayleigh" or "rician:6"; ValueError naming the setting and what is wrong with it.

    `others` is what its message names as allowed besides the laws.
    """
    plain, colon, number = name.partition(":") if isinstance(name, str) else (name, "", "")
    if plain not in FADINGS:
        known = ", ".join(law.name + (f":{law.parameter}" if law.parameter else "") for law in FADINGS)
        require(False, setting, name, f"among {known}{others}")
    law = FADINGS.find(plain)
    if law.parameter is None:
        require(not colon, setting, name, f"{plain} alone, it has no parameter")
        return law.make()
    require(bool(number), setting, name, f"{plain}:NUMBER, the {law.parameter}")
    try:
        return law.make(float(number))
    except ValueError as error:
        raise ValueError(f"{setting} is {name!r}; after the colon comes the {law.parameter} ({error})") from None
