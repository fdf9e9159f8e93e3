"""Meshes from a configuration, logical axis names, shardings of parameters and batches, and start-up on many hosts."""

import dataclasses
import math
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from megjax.configs import is_integer, require
from megjax.processes import watch_others

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "realisation": ("data", "fsdp", "tensor"),
    "parameter": ("fsdp",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
}
"""Logical axis -> the mesh axes that it is spread over."""
SMALLEST_SHARDED = 2**14
"""Parameters of fewer elements stay whole on every device: gathering them would cost more than it saves."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: whatever is left of the devices.

    `data` and `fsdp` both split the batch; `fsdp` also splits parameters and optimiser state (S. Rajbhandari et al.,
    "ZeRO", 2020, stage 3); `tensor` splits heads and hidden units.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        for name, size in zip(AXES, sizes, strict=True):
            whole = is_integer(size) and (size >= 1 or size == -1)
            require(whole, f"mesh: {name}", size, "a positive integer, or -1 for the rest")
        require(sizes.count(-1) <= 1, "mesh", dict(zip(AXES, sizes, strict=True)), "-1 on one axis at most")

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """The axes' sizes on so many devices; ValueError unless they multiply to them."""
        sizes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            require(num_devices % known == 0, "mesh: known axes' product", known, f"a divisor of {num_devices} devices")
            return tuple(num_devices // known if size == -1 else size for size in sizes)
        require(known == num_devices, "mesh: data x fsdp x tensor", known, f"the number of devices, {num_devices}")
        return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over `devices` (default: all), with the axes `AXES`.

    Neighbours on an axis are neighbours in the network, the last axis being the fastest. ValueError if the sizes do not
    multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(mesh_utils.create_device_mesh(config.sizes(len(devices)), devices), AXES)


def mesh_of(devices: Sequence[jax.Device], sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of exactly these devices in their order, with axes of these sizes; by default "data" alone."""
    sizes = {"data": len(devices)} if sizes is None else sizes
    return Mesh(np.asarray(devices, object).reshape(tuple(sizes.values())), tuple(sizes))


def data_mesh(count: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of this process) on the axis "data" if they divide a batch, else the first of them."""
    devices = jax.local_devices() if devices is None else devices
    return mesh_of(devices if count % len(devices) == 0 else devices[:1])


def partition_spec(
    names: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = RULES, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names (None: not split).

    ValueError for a name without a rule, a rule that names an axis that the mesh does not have, or a mesh axis used
    twice.
    """
    axes = AXES if mesh is None else mesh.axis_names
    used: list[str] = []
    entries = []
    for name in names:
        require(name is None or name in rules, "logical axis", name, f"one of {tuple(rules)}")
        entry = () if name is None else tuple(rules[name])
        for axis in entry:
            require(axis in axes, f"mesh axis of {name!r}", axis, f"one of {tuple(axes)}")
            require(axis not in used, "mesh axis used twice", axis, f"once among {tuple(names)}")
            used.append(axis)
        entries.append((entry[0] if len(entry) == 1 else entry) if entry else None)
    return PartitionSpec(*entries)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is a batch."""
    return NamedSharding(mesh, partition_spec(("batch",), mesh=mesh))


def fsdp_specs(params: PyTree, size: int, smallest: int = SMALLEST_SHARDED) -> PyTree:
    """PartitionSpec of each array of a tree: its largest axis that `size` divides is split over "fsdp".

    Arrays of fewer than `smallest` elements, or without such an axis, stay whole. ValueError unless `size` is positive.
    """
    require(size >= 1, "size of the fsdp axis", size, "at least 1")

    def spec(x) -> PartitionSpec:
        fitting = [axis for axis, length in enumerate(x.shape) if length and length % size == 0]
        if size == 1 or not fitting or math.prod(x.shape) < smallest:
            return PartitionSpec()
        split = max(fitting, key=lambda axis: (x.shape[axis], axis))
        return PartitionSpec(*(["fsdp" if axis == split else None for axis in range(split + 1)]))

    return jax.tree.map(spec, params)


def fsdp_shardings(mesh: Mesh, params: PyTree, smallest: int = SMALLEST_SHARDED) -> PyTree:
    """NamedSharding of each array of a tree of parameters or optimiser state; see `fsdp_specs`."""
    specs = fsdp_specs(params, mesh.shape["fsdp"], smallest)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


TENSOR_AXES = (
    (r"\.to_[qkv]\.(kernel|bias)$", -1, "heads"),
    (r"\.to_out\.0\.kernel$", -2, "heads"),
    (r"\.ff\.net\.0\.proj\.(kernel|bias)$", -1, "hidden"),
    (r"\.ff\.net\.2\.kernel$", -2, "hidden"),
    (r"\.resnets\.\d+\.(conv1|norm2|time_emb_proj)\.\w+$", -1, "hidden"),
    (r"\.resnets\.\d+\.conv2\.kernel$", -2, "hidden"),
)
"""Parameters of U-Net and VAE that are split over "tensor": a pattern of names, the axis, and its logical name.

Pairs of layers split their inner axis, so that each pair ends in one sum over the devices (M. Shoeybi et al.,
"Megatron-LM", 2019, sec. 3), of attention, gated MLP and residual block alike.
"""


def tensor_specs(params: PyTree, size: int, rules: Mapping[str, tuple[str, ...]] = RULES) -> PyTree:
    """PartitionSpec of each array of the diffusion networks' parameters where `size` devices make an image together.

    What no line of `TENSOR_AXES` names, or `size` does not divide, stays whole. ValueError unless `size` is positive.
    """
    require(size >= 1, "size of the tensor axis", size, "at least 1")

    def spec(path, x) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for pattern, axis, logical in TENSOR_AXES:
            if size > 1 and re.search(pattern, f".{name}") and x.shape[axis] % size == 0:
                return partition_spec([logical if i == x.ndim + axis else None for i in range(x.ndim)], rules)
        return PartitionSpec()

    return jax.tree.map_with_path(spec, params)


def tensor_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """NamedSharding of each array of the diffusion networks' parameters; see `tensor_specs`."""
    specs = tensor_specs(params, mesh.shape["tensor"])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """`x` with its axes, of these logical names, spread over the mesh of the context (`jax.set_mesh`).

    Unchanged without a mesh, inside `shard_map`, or where the mesh does not divide an axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    spec = partition_spec(names, mesh=mesh)
    for length, entry in zip(x.shape, spec, strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if length % math.prod(mesh.shape[axis] for axis in axes):
            return x
    return jax.lax.with_sharding_constraint(x, spec)


def shard_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Arrays of this process's share of the batch, spread over its devices: global arrays with `batch_sharding`.

    On one process the share is the whole batch. ValueError if the devices do not divide the batch.
    """
    sharding, ways = batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]

    def place(x):
        whole = x.shape[0] * jax.process_count()
        require(whole % ways == 0, "batch", whole, f"a multiple of data x fsdp, {ways}")
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, batch)


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process joins the others: by address, count and number, or (None) as JAX finds out by itself."""

    found_by: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Processes | None:
    """The job that this process belongs to; None if it is alone.

    In this order: the arguments; JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (an indexed
    Kubernetes job sets the last as JOB_COMPLETION_INDEX); a TPU slice on GKE; Slurm; Open MPI.
    Raises ValueError if some of what is needed is missing or wrong.
    """
    environ = os.environ if environ is None else environ
    address = coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        given = {"num_processes": num_processes, "process_id": process_id}
        alone = all(value is None for value in given.values())
        require(alone, "coordinator_address", None, f"given with {given}, as host:port")
        return _managed(environ)
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdigit(), "coordinator address", address, "host:port")
    mpi = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    count = _number(environ, num_processes, "JAX_NUM_PROCESSES", mpi[0])
    index = _number(environ, process_id, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", mpi[1])
    require(count >= 1, "number of processes", count, "at least 1")
    require(0 <= index < count, "process id", index, f"in [0, {count})")
    return Processes("address", address, count, index) if count > 1 else None


def _managed(environ: Mapping[str, str]) -> Processes | None:
    """Environments that JAX knows how to read."""
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    if environ.get("TPU_WORKER_ID", "").isdigit() and ("," in hosts or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1):
        return Processes("gke")
    # SLURM_NTASKS alone is also set in a batch script, which is one process; srun sets the list of the step's nodes.
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return Processes("slurm")
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        known = "OMPI_MCA_orte_hnp_uri" in environ
        require(known, "JAX_COORDINATOR_ADDRESS", None, "host:port of process 0, which Open MPI 5 does not tell")
        return Processes("ompi")
    return None


def _number(environ: Mapping[str, str], given: int | None, *names: str) -> int:
    """The argument, or the first of these variables that is set; ValueError if none is, or it is no number."""
    if given is not None:
        return given
    name = next((name for name in names if name in environ), None)
    require(name is not None, names[0], None, "set together with the coordinator address")
    require(environ[name].isdigit(), name, environ[name], "an integer of at least 0")
    return int(environ[name])


def start_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    startup_seconds: int = 300,
    heartbeat_seconds: int = 60,
) -> Any:
    """Join the other processes of the job, before any use of a device; returns what was found, None on a lone process.

    It waits up to `startup_seconds` for all of them: a job whose nodes start far apart needs more. If one does not
    come, JAX ends those that wait with a message.
    A process that is not heard of for `heartbeat_seconds` counts as lost, and the others end with a message that names
    it (`processes.watch_others`). All processes of a job must give the same. Raises ValueError as `find_processes`, or
    if devices were used already.
    """
    found = find_processes(coordinator_address, num_processes, process_id)
    if found is None or jax.distributed.is_initialized():
        return found
    method = "deactivate" if found.found_by == "address" else None
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            found.coordinator_address,
            found.num_processes,
            found.process_id,
            cluster_detection_method=method,
            initialization_timeout=startup_seconds,
            heartbeat_timeout_seconds=2 * heartbeat_seconds,  # so that the message above comes first
        )
    except RuntimeError as error:
        raise ValueError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread():
        # JAX's preemption service would note a SIGTERM and let the process go on, wherever it is.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    watch_others(heartbeat_seconds)
    return found
