"""Power control over fading blocks: the environment, policies from equal power to the causal optimum, and PPO."""

from megjax.power.actor_critic import ActorCriticConfig, LearnedPower
from megjax.power.environment import EnvParams, EnvState, PowerControl
from megjax.power.laws import GainLaw, gain_law, load_table, static_power
from megjax.power.policies import (
    POLICIES,
    CausalOptimum,
    ChannelInversion,
    Clairvoyant,
    ClairvoyantWaterfilling,
    EqualPower,
    LoadedPower,
    Policy,
    PowerPolicy,
    StaticPower,
    Waterfilling,
    causal_optimum,
    check_policy,
    find_policy,
    make_policy,
)
from megjax.power.ppo import PPO, Hyperparameters, PPOConfig, make_ppo
from megjax.power.problem import Problem, power_problem, weighted_errors

__all__ = [
    "CausalOptimum",
    "ChannelInversion",
    "Clairvoyant",
    "ClairvoyantWaterfilling",
    "EnvParams",
    "EnvState",
    "ActorCriticConfig",
    "EqualPower",
    "GainLaw",
    "Hyperparameters",
    "LearnedPower",
    "LoadedPower",
    "POLICIES",
    "PPO",
    "PPOConfig",
    "Policy",
    "PowerPolicy",
    "PowerControl",
    "Problem",
    "StaticPower",
    "Waterfilling",
    "causal_optimum",
    "check_policy",
    "find_policy",
    "gain_law",
    "load_table",
    "make_policy",
    "make_ppo",
    "power_problem",
    "static_power",
    "weighted_errors",
]
