"""Power policies by the names that tables and command lines use."""

from megjax.channel import Fading
from megjax.configs import require
from megjax.power.actor_critic import LearnedPower
from megjax.power.dp import causal_optimum
from megjax.power.laws import gain_law, load_table
from megjax.power.policies import (
    ChannelInversion,
    Clairvoyant,
    ClairvoyantWaterfilling,
    EqualPower,
    Policy,
    StaticPower,
    Waterfilling,
)

POLICIES = (
    "equal",
    "static",
    "codec",
    "inversion",
    "waterfilling",
    "waterfilling_clairvoyant",
    "clairvoyant",
    "dp",
    "ppo",
)


def make_policy(name: str, fading: Fading, num_blocks: int = 16, trained: str = "scenes") -> Policy | None:
    """The policy of this name for a law of fading; None for "codec", the load that comes with a code.

    `trained` is where "ppo" comes from: "scenes" (bundled) or a folder of `LearnedPower.save_pretrained`. For use
    outside jit. ValueError for an unknown name, "dp" on fading that has none, or a trained policy that does not fit.
    """
    require(name in POLICIES, "policy", name, f"one of {POLICIES}")
    if name == "codec":
        return None
    if name == "ppo":
        return LearnedPower.from_pretrained(trained, num_blocks)
    if name == "dp":
        return causal_optimum(fading, num_blocks)
    if name == "static":
        return StaticPower(load_table(gain_law(fading, num_blocks)))
    if name in ("inversion", "waterfilling"):
        law = gain_law(fading, num_blocks)
        return ChannelInversion(law) if name == "inversion" else Waterfilling(law)
    plain = {"equal": EqualPower, "waterfilling_clairvoyant": ClairvoyantWaterfilling, "clairvoyant": Clairvoyant}
    return plain[name]()
