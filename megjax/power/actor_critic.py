"""The networks of PPO, and a trained actor as a power policy with files."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from megjax.configs import from_mapping, read_json, require, require_positive_integers, write_json
from megjax.files import read_safetensors, write_safetensors
from megjax.power.environment import episode_features, observation, observation_size, share_of_offset
from megjax.power.laws import TABLE_SIZE, LoadTable, static_power
from megjax.power.policies.base import POLICIES, PowerPolicy, spend
from megjax.power.problem import Problem, check_gains
from megjax.pytrees import pytree_dataclass, static

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED = ("scenes",)
LOG_STD_RANGE = (float(np.log(0.25)), 1.5)


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
    """Static description: blocks and history of the environment, widths of the hidden layers of both networks.

    With `asymmetric` the critic also sees the gains of the blocks to come, which training may and a policy may not.
    """

    num_blocks: int = 16
    history: int = 0
    hidden: tuple[int, ...] = (64, 64)
    asymmetric: bool = True
    initial_std: float = 1.0

    def __post_init__(self):
        require_positive_integers(self, "actor-critic", ("num_blocks", "hidden"))
        require(self.history >= 0, "history", self.history, "at least 0")
        require(self.initial_std > 0, "initial_std", self.initial_std, "positive")

    @property
    def critic_inputs(self) -> int:
        """Features of the critic: the observation, the plan's return, and with `asymmetric` T gains."""
        extra = self.num_blocks + 1 if self.asymmetric else 0
        return observation_size(self.num_blocks, self.history) + extra


class MLP(nnx.Module):
    """Perceptron with tanh units, orthogonal kernels and outputs that start near zero."""

    def __init__(self, inputs: int, hidden: tuple[int, ...], outputs: int, rngs: nnx.Rngs):
        sizes = (inputs, *hidden)
        wide = nnx.initializers.orthogonal(np.sqrt(2))
        self.layers = nnx.List(
            [nnx.Linear(a, b, kernel_init=wide, rngs=rngs) for a, b in zip(sizes[:-1], hidden, strict=True)]
        )
        self.output = nnx.Linear(sizes[-1], outputs, kernel_init=nnx.initializers.orthogonal(0.01), rngs=rngs)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b k"]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.output(x)


class Actor(nnx.Module):
    """Mean and logarithm of the standard deviation of the offset from the planned share.

    Through `share_of_offset` the Gaussian becomes a logistic-normal share: a squashed Gaussian policy. The deviation
    depends on the state, as what an offset is worth does: little at low SNR, much at high.
    """

    def __init__(self, config: ActorCriticConfig, rngs: nnx.Rngs):
        size, zeros = observation_size(config.num_blocks, config.history), nnx.initializers.zeros
        self.network = MLP(size, config.hidden, 2, rngs)
        self.skip = nnx.Linear(size, 1, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.log_std = nnx.Param(jnp.full((), np.log(config.initial_std), jnp.float32))

    def __call__(self, obs: Float[Array, "*b o"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        out = self.network(obs)
        return out[..., 0] + self.skip(obs)[..., 0], jnp.clip(self.log_std[...] + out[..., 1], *LOG_STD_RANGE)


class ActorCritic(nnx.Module):
    """Two perceptrons without shared layers."""

    def __init__(self, config: ActorCriticConfig, rngs: nnx.Rngs):
        self.actor = Actor(config, rngs)
        self.critic = MLP(config.critic_inputs, config.hidden, 1, rngs)


@pytree_dataclass
class LearnedPower:
    """A trained actor, taking its mean action; `policy.allocate` as of any power policy.

    Observations are standardised by `mean` and `std` [o]; `table` belongs to the law of the gains that the plan is for.
    """

    causal: ClassVar[bool] = True
    config: ActorCriticConfig = static()
    graph: Any = static()
    state: Any
    mean: Float[Array, " o"]
    std: Float[Array, " o"]
    table: LoadTable

    def allocate(self, gains: Float[Array, " t"], problem: Problem) -> Float[Array, " t"]:
        """As in `Policy`; ValueError for another number of blocks than it was trained for."""
        check_gains(gains)
        num_blocks = self.config.num_blocks
        if gains.shape != (num_blocks,) or problem.weights.shape != (num_blocks,):
            shapes = f"gains {gains.shape} and weights {problem.weights.shape}"
            raise ValueError(f"{shapes} do not fit this policy; both must have shape ({num_blocks},)")
        actor = nnx.merge(self.graph, self.state)
        plan = static_power(self.table, problem.weights, problem.snr, problem.energy, problem.max_power)
        rows = episode_features(gains, problem, plan, self.config.history)

        def decide(view):
            row = jax.tree.map(lambda x: x[view.block], rows)
            offset, _ = actor((observation(row, view.energy) - self.mean) / self.std)
            return share_of_offset(row.share, offset) * view.energy

        return spend(decide, gains, problem)

    def power_at(
        self, gain: Float[Array, ""], energy: Float[Array, ""], block: int, problem: Problem
    ) -> Float[Array, ""]:
        """Power of block `block` (from 0, not the last) with this energy left, all gains so far being the same."""
        plan = static_power(self.table, problem.weights, problem.snr, problem.energy, problem.max_power)
        known = jnp.full(self.config.num_blocks, gain, jnp.float32)
        row = jax.tree.map(lambda x: x[block], episode_features(known, problem, plan, self.config.history))
        offset, _ = nnx.merge(self.graph, self.state)((observation(row, energy) - self.mean) / self.std)
        return jnp.minimum(share_of_offset(row.share, offset) * energy, problem.max_power)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and weights to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_NAME, dataclasses.asdict(self.config))
        write_safetensors(folder / WEIGHTS_NAME, {name: np.array(x) for name, x in self._tensors().items()})

    def _tensors(self) -> dict[str, Array]:
        flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(self.state)}
        return flat | {"mean": self.mean, "std": self.std} | {f"table.{k}": v for k, v in self.table._asdict().items()}

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, num_blocks: int | None = None) -> "LearnedPower":
        """Load "scenes" (bundled) or a folder that `save_pretrained` wrote.

        Raises ValueError when there is no such folder, its weights are damaged or do not fit its configuration, or the
        policy is for another number of blocks than `num_blocks`.
        """
        bundled = name_or_folder in BUNDLED and not Path(name_or_folder).is_dir()
        folder = ASSETS / str(name_or_folder) / "power" if bundled else Path(name_or_folder)
        require(folder.is_dir(), "power policy", str(name_or_folder), f"one of {BUNDLED} or an existing folder")
        config = from_mapping(ActorCriticConfig, read_json(folder / CONFIG_NAME), source=str(folder / CONFIG_NAME))
        fits = num_blocks is None or config.num_blocks == num_blocks
        require(fits, f"{folder}: num_blocks", config.num_blocks, f"{num_blocks}, as the environment has")
        blank = blank_policy(config)
        path = folder / WEIGHTS_NAME
        found = read_safetensors(path, blank._tensors())
        require(bool(np.all(found["std"] > 0)), f"{path}: smallest std", float(np.min(found["std"])), "positive")
        found = {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
        flat = [(p, v.replace(found[".".join(map(str, p))])) for p, v in nnx.to_flat_state(blank.state)]
        table = LoadTable(*(found[f"table.{name}"] for name in LoadTable._fields))
        state = nnx.from_flat_state(flat)
        return dataclasses.replace(blank, state=state, mean=found["mean"], std=found["std"], table=table)


def blank_policy(config: ActorCriticConfig) -> LearnedPower:
    """A policy of zeros: its shapes are those of a trained one."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Actor(config, nnx.Rngs(0))))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    size = observation_size(config.num_blocks, config.history)
    table = LoadTable(jnp.zeros(TABLE_SIZE, jnp.float32), jnp.zeros((), jnp.float32))
    return LearnedPower(config, graph, state, jnp.zeros(size, jnp.float32), jnp.ones(size, jnp.float32), table)


POLICIES.register(
    PowerPolicy(
        name="ppo",
        title="PPO",
        version=1,
        rank=90,
        make=lambda fading, num_blocks, folder="scenes": LearnedPower.from_pretrained(folder, num_blocks),
        parameter="FOLDER",
        trained=True,
    )
)
