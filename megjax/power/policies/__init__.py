"""Power policies, each beside the record that names it; `POLICIES` lists them."""

from megjax.power.policies.base import (
    POLICIES,
    Policy,
    PowerPolicy,
    View,
    check_policy,
    find_policy,
    make_policy,
    spend,
)
from megjax.power.policies.clairvoyant import Clairvoyant, ClairvoyantWaterfilling
from megjax.power.policies.closed_loop import ChannelInversion, Waterfilling
from megjax.power.policies.dp import CausalOptimum, causal_optimum
from megjax.power.policies.open_loop import EqualPower, LoadedPower, StaticPower

__all__ = [
    "CausalOptimum",
    "ChannelInversion",
    "Clairvoyant",
    "ClairvoyantWaterfilling",
    "EqualPower",
    "LoadedPower",
    "POLICIES",
    "Policy",
    "PowerPolicy",
    "StaticPower",
    "View",
    "Waterfilling",
    "causal_optimum",
    "check_policy",
    "find_policy",
    "make_policy",
    "spend",
]
