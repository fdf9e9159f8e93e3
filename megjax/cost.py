"""What a compiled program costs: XLA's operation and byte counts, memory, collectives, and the roofline of a chip.

All numbers are per device. XLA counts the body of a loop once, whatever its trip count. Either the body is measured
alone and costs are composed, `prologue + num_steps * body`, or `cost_of_compiled(..., repeat_loops=True)` adds the
other passes from the text of the program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import PyTree

from megjax import hlo
from megjax.configs import is_integer, require

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public peak numbers of one accelerator chip.

    `ici_bandwidth` is what the chip can send in one direction over all of its links together, bytes/s: half of what
    vendors call bidirectional. `source` says where the numbers were published.
    """

    name: str
    flops: float
    """Dense bfloat16 operations per second, a multiply-add being two."""
    hbm_bandwidth: float
    """Bytes per second."""
    hbm_bytes: float
    ici_bandwidth: float
    source: str


_TPU = "cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 32.0 * _GIB, 300e9, f"{_TPU}v4; links: Jouppi et al. 2023, arXiv 2304.01433"),
        Chip("v5e", 197e12, 819e9, 16.0 * _GIB, 200e9, f"{_TPU}v5e"),
        Chip("v5p", 459e12, 2765e9, 95.0 * _GIB, 600e9, f"{_TPU}v5p"),
        Chip("v6e", 918e12, 1640e9, 32.0 * _GIB, 400e9, f"{_TPU}v6e"),
        Chip("tpu7x", 2307e12, 7380e9, 192.0 * _GIB, 600e9, f"{_TPU}tpu7x"),
        Chip("a100", 312e12, 2039e9, 80e9, 300e9, "NVIDIA A100 SXM 80 GB data sheet"),
        Chip("h100", 989.4e12, 3350e9, 80e9, 450e9, "NVIDIA H100 SXM data sheet"),
        Chip("h200", 989.4e12, 4800e9, 141e9, 450e9, "NVIDIA H200 SXM data sheet"),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of this name; ValueError for one that is not in `CHIPS`."""
    require(name in CHIPS, "chip", name, f"one of {tuple(CHIPS)}")
    return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of device memory that a program holds while it runs; `aliased` outputs live in donated arguments."""

    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind: how many, and bytes of their larger side (input or result) on one device.

    `sent` is what a device sends in the bandwidth-optimal ring algorithm over n devices: (n - 1)/n of the bytes, twice
    that for an all-reduce, and all of them for a permute (R. Thakur et al., "Optimization of Collective Communication
    Operations in MPICH", 2005).
    """

    kind: str
    count: int
    bytes: int | float
    sent: int | float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations, bytes moved to and from memory, collectives and memory of a program on one device.

    Costs of programs that run one after the other add, and `cost * n` is the cost of n runs; memory then is the largest
    of any of them, not the sum.
    """

    flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: tuple[Collective, ...] = ()
    memory: Memory = Memory()

    def __add__(self, other: "Cost") -> "Cost":
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            self.flops + other.flops,
            self.bytes_accessed + other.bytes_accessed,
            _merge((*self.collectives, *other.collectives)),
            max(self.memory, other.memory, key=lambda memory: memory.total),
        )

    def __mul__(self, times: int) -> "Cost":
        if not is_integer(times):
            return NotImplemented
        require(times >= 0, "number of runs", times, "at least 0")
        return dataclasses.replace(
            self,
            flops=self.flops * times,
            bytes_accessed=self.bytes_accessed * times,
            collectives=tuple(
                Collective(c.kind, c.count * times, c.bytes * times, c.sent * times) for c in self.collectives if times
            ),
        )

    __rmul__ = __mul__

    @property
    def bytes_sent(self) -> int | float:
        """Bytes that a device sends to others."""
        return sum(c.sent for c in self.collectives)


def _merge(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """One entry per kind, in the order of `hlo.COLLECTIVES`."""
    found: dict[str, Collective] = {}
    for c in collectives:
        old = found.get(c.kind, Collective(c.kind, 0, 0, 0))
        found[c.kind] = Collective(c.kind, old.count + c.count, old.bytes + c.bytes, old.sent + c.sent)
    return tuple(found[kind] for kind in hlo.COLLECTIVES if kind in found)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds in seconds on the time of a program, by what would take it."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The largest bound: all three overlapping perfectly."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """What the program is bound by: "compute", "memory" or "interconnect"."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip, devices_per_chip: int = 1) -> Roofline:
    """Roofline of a program on a chip (S. Williams et al. 2009), with a third roof for what it sends to others.

    `devices_per_chip` is how many of JAX's devices share the chip's peaks evenly. ValueError unless it is at least 1.
    """
    require(devices_per_chip >= 1, "devices_per_chip", devices_per_chip, "at least 1")
    return Roofline(
        cost.flops * devices_per_chip / chip.flops,
        cost.bytes_accessed * devices_per_chip / chip.hbm_bandwidth,
        cost.bytes_sent * devices_per_chip / chip.ici_bandwidth,
    )


def shapes_of(tree: PyTree, sharding: Any = None) -> PyTree:
    """The arrays of a tree as shapes, with `sharding` if given (else their own, where they have one)."""

    def shape(x):
        placed = getattr(x, "sharding", None) if sharding is None else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    return jax.tree.map(shape, tree)


def cost_of(fn: Callable, *args: PyTree, **static: Any) -> Cost:
    """Cost of `fn(*args, **static)` from shapes alone: compiled, never run.

    `args` are arrays or `jax.ShapeDtypeStruct`s; those that carry a sharding decide the devices, which may be a
    topology's. `static` are compile-time constants. `fn` may be jitted already. The body of a loop counts once.

    Raises ValueError if the backend cannot analyse its programs.
    """
    bound = functools.partial(fn, **static) if static else fn
    jitted = bound if hasattr(bound, "lower") else jax.jit(bound)
    return cost_of_compiled(jitted.lower(*args).compile())


def nominal_flops(fn: Callable, *args: PyTree) -> float:
    """Operations of `fn(*args)` as its layers are defined, by XLA's count before it optimises; nothing is compiled.

    The number does not depend on the machine: compiled for a CPU, some convolutions of megjax multiply less often, and
    XLA does not see into the kernels of other devices. The body of a loop counts once. ValueError if XLA cannot analyse
    the program, or if JAX was told to leave out its CPU backend, which does.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise ValueError("operations are counted by JAX's CPU backend; add cpu to JAX_PLATFORMS") from None
    with jax.default_device(cpu):  # plugins for other devices have no analysis of programs that are not compiled
        # Layers have kernels of their own for CPUs, TPUs and CUDA, but none for this platform.
        counts = jitted.trace(*shapes).lower(lowering_platforms=("rocm",)).cost_analysis()
    if not counts:
        raise ValueError("the backend has no cost analysis")
    return float(counts.get("flops", 0.0))


def cost_of_compiled(compiled: jax.stages.Compiled, *, repeat_loops: bool = False) -> Cost:
    """Cost of a compiled program; ValueError if its backend offers no analysis.

    With `repeat_loops`, loops count as often as they run: the operations of the passes that XLA leaves out are added
    from the text of the compiled program, and bytes, which are then those of main memory, are counted from it
    altogether (see `megjax.hlo`). Loops of unknown trip count still count once.
    """
    counts, stats = compiled.cost_analysis(), compiled.memory_analysis()
    counts = counts[0] if isinstance(counts, list | tuple) and counts else counts
    if not counts or stats is None:
        raise ValueError("the backend has no cost analysis; compile for cpu, tpu or gpu")
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    module = hlo.Module(compiled.as_text())
    once, work = module.work(repeat=False), module.work(repeat=repeat_loops)
    return Cost(
        float(counts.get("flops", 0.0)) + work.flops - once.flops + work.unseen,
        work.bytes if repeat_loops else float(counts.get("bytes accessed", 0.0)),
        _merge(_collective(*collective) for collective in work.collectives),
        memory,
    )


def _collective(kind: str, size: float, devices: float, count: int) -> Collective:
    share = 1.0 if kind == "collective-permute" else (1 - 1 / devices) * (2 if kind == "all-reduce" else 1)
    return Collective(kind, count, size * count, size * share * count)
