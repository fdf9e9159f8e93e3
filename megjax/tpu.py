"""TPU configurations: one file per topology, with its mesh, batches and launch facts, and its devices without a TPU."""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from megjax.configs import from_mapping, read_json, require, require_positive_integers
from megjax.cost import Chip, find_chip
from megjax.sharding import MeshConfig, make_mesh

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Generation:
    """Dimensions of a topology, JAX's devices per chip, and libtpu's options for the chip as it is run."""

    dimensions: int
    devices_per_chip: int = 1
    options: dict[str, str] = dataclasses.field(default_factory=dict)


GENERATIONS = {
    # The two cores of a v4 chip are one device (megacore), as on the machines.
    "v4": Generation(3, options={"chip_config_name": "megacore"}),
    "v5e": Generation(2),
    "v5p": Generation(3),
    "v6e": Generation(2),
    "tpu7x": Generation(3, devices_per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Batches:
    """Per device: images generated and images decoded at once, latents sent in a sweep, groups of latents, agents, and
    training images."""

    generate: int = 1
    decode: int = 8
    sweep: int = 1
    codec: int = 1
    power: int = 1
    ldm: int = 1

    def __post_init__(self):
        require_positive_integers(self, "batch", [field.name for field in dataclasses.fields(self)])


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a scheduler must be told: accelerator and machine type of Google Cloud, hosts, chips each, boot disk."""

    accelerator_type: str
    machine_type: str
    hosts: int
    chips_per_host: int
    disk_gib: int = 100

    def __post_init__(self):
        require_positive_integers(self, "launch", ("hosts", "chips_per_host", "disk_gib"))


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """A file of `tpu_configs/`.

    `topology` is JAX's name, such as "v5e:2x4"; `xla_flags` go to LIBTPU_INIT_ARGS on a TPU, and to the compiler ahead
    of time.
    """

    topology: str
    mesh: MeshConfig
    batch: Batches
    launch: Launch
    dtype: str = "bfloat16"
    xla_flags: tuple[str, ...] = ()

    def __post_init__(self):
        name, _, shape = self.topology.partition(":")
        require(
            name in GENERATIONS, "topology", self.topology, f"<generation>:<shape> with one of {tuple(GENERATIONS)}"
        )
        sides = "x".join(["n"] * self.generation.dimensions)
        valid = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and len(self.shape) == self.generation.dimensions
        require(bool(valid), "topology", self.topology, f"{name}:{sides}")
        self.mesh.sizes(self.num_devices)
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {DTYPES}")
        chips = self.launch.hosts * self.launch.chips_per_host
        require(chips == self.num_chips, "launch: hosts x chips_per_host", chips, f"{self.num_chips}, the topology's")
        for flag in self.xla_flags:
            valid = isinstance(flag, str) and re.fullmatch(r"--xla_\w+=\S+", flag)
            require(bool(valid), "xla_flags", flag, "of the form --xla_name=value")

    @classmethod
    def from_file(cls, path: str | Path) -> "TpuConfig":
        """Read a JSON file; ValueError naming the file and the setting that is wrong."""
        path = Path(path)
        values = read_json(path)
        try:
            nested: dict[str, Any] = {"mesh": MeshConfig, "batch": Batches, "launch": Launch}
            parts = {
                key: from_mapping(nested[key], value, source=key)
                if key in nested and isinstance(value, dict)
                else value
                for key, value in values.items()
            }
            for key, kind in nested.items():
                require(isinstance(parts.get(key), kind), key, parts.get(key), "an object")
            return from_mapping(cls, parts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.topology.partition(":")[0]]

    @property
    def chip(self) -> Chip:
        return find_chip(self.topology.partition(":")[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each side."""
        return tuple(int(side) for side in self.topology.partition(":")[2].split("x"))

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """What JAX shows: one a chip, or one a core."""
        return self.num_chips * self.generation.devices_per_chip

    @property
    def compiler_options(self) -> dict[str, str]:
        """The flags as options of `Lowered.compile`."""
        return dict(flag.removeprefix("--").split("=", 1) for flag in self.xla_flags)

    def devices(self) -> list[jax.Device]:
        """The topology's devices, to compile for: no TPU is needed, but libtpu is.

        Raises ValueError if libtpu is missing or does not know the topology.
        """
        find_libtpu()
        # Compiling needs neither Google Cloud's metadata server, which is slow to fail elsewhere, nor libtpu alone.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        try:
            described = topologies.get_topology_desc(self.topology, "tpu", **self.generation.options)
        except RuntimeError as error:
            raise ValueError(f"topology {self.topology}: {str(error).splitlines()[0]}") from None
        return list(described.devices)

    def make_mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """The configuration's mesh over these devices (default: the topology's, without a TPU)."""
        return make_mesh(self.mesh, self.devices() if devices is None else devices)


def find_libtpu() -> None:
    """Let Python import libtpu from where `make tpu` puts it, apart from the environment's other packages.

    Raises ValueError if libtpu is neither there nor installed.
    """
    apart = str(Path(sys.prefix) / "libtpu")
    if importlib.util.find_spec("libtpu") is None and apart not in sys.path:
        sys.path.append(apart)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, which compiles for TPUs, is not installed; `make tpu` or pip install 'megjax[tpu]'")
