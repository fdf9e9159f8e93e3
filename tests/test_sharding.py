"""Meshes, specifications of shardings, and how a process finds its job."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from megjax.sharding import (
    MeshConfig,
    Processes,
    data_mesh,
    find_processes,
    fsdp_specs,
    make_mesh,
    mesh_of,
    partition_spec,
    shard_batch,
    start_processes,
    tensor_specs,
)


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1)),
        (MeshConfig(2, -1, 2), 16, (2, 4, 2)),
        (MeshConfig(1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_sizes_multiply_to_the_devices(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(3).sizes(8), "mesh: data x fsdp x tensor is 3; it must be the number of devices, 8"),
        (lambda: MeshConfig(fsdp=3).sizes(8), "product is 3; it must be a divisor of 8 devices"),
        (lambda: MeshConfig(-1, -1), "-1 on one axis at most"),
        (lambda: MeshConfig(tensor=0), "mesh: tensor is 0"),
        (lambda: MeshConfig(data=True), "mesh: data is True"),
        (lambda: make_mesh(MeshConfig(7, 11)), "the number of devices, 1"),
        (lambda: partition_spec(("batch", "colour")), "logical axis is 'colour'"),
        (lambda: partition_spec(("x",), {"x": ("rows",)}), "mesh axis of 'x' is 'rows'"),
        (lambda: partition_spec(("batch", "parameter")), "mesh axis used twice is 'fsdp'"),
        (lambda: fsdp_specs(jnp.ones(3), 0), "size of the fsdp axis is 0"),
        (lambda: tensor_specs(jnp.ones(3), 0), "size of the tensor axis is 0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_logical_names():
    assert partition_spec(("batch", None, "heads")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert partition_spec(()) == PartitionSpec()


def test_fsdp_splits_the_largest_axis_that_divides():
    shapes = {"kernel": (3, 3, 320, 640), "odd": (7, 9, 4096), "small": (8, 8), "prime": (10007, 2), "bias": (65536,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert fsdp_specs(params, 8) == {
        "kernel": PartitionSpec(None, None, None, "fsdp"),
        "odd": PartitionSpec(None, None, "fsdp"),
        "small": PartitionSpec(),
        "prime": PartitionSpec(),
        "bias": PartitionSpec("fsdp"),
    }
    assert set(fsdp_specs(params, 1).values()) == {PartitionSpec()}


def test_tensor_specs_pair_the_layers():
    """Of every pair the first splits its outputs and the second its inputs; what does not divide stays whole."""
    names = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0": {
            "attn1": {"to_q": {"kernel": (320, 320)}, "to_out": [{"kernel": (320, 320), "bias": (320,)}]},
            "ff": {"net": [{"proj": {"kernel": (320, 2560), "bias": (2560,)}}, {}, {"kernel": (1280, 320)}]},
            "norm2": {"scale": (320,)},
        },
        "unet.down_blocks.0.resnets.0": {
            "conv1": {"kernel": (3, 3, 4, 320), "bias": (320,)},
            "norm2": {"scale": (320,), "bias": (320,)},
            "conv2": {"kernel": (3, 3, 320, 320), "bias": (320,)},
            "conv_shortcut": {"kernel": (1, 1, 4, 320)},
        },
        "odd.resnets.0": {"conv1": {"kernel": (3, 3, 4, 30)}},
    }

    def shape(size):
        return jax.ShapeDtypeStruct(size, jnp.float32)

    params = jax.tree.map(shape, names, is_leaf=lambda x: isinstance(x, tuple))
    last, whole = (lambda n: PartitionSpec(*[None] * (n - 1), "tensor")), PartitionSpec()
    specs = tensor_specs(params, 4)
    block, resnet, odd = (specs[name] for name in names)
    assert block == {
        "attn1": {"to_q": {"kernel": last(2)}, "to_out": [{"kernel": PartitionSpec("tensor", None), "bias": whole}]},
        "ff": {"net": [{"proj": {"kernel": last(2), "bias": last(1)}}, {}, {"kernel": PartitionSpec("tensor", None)}]},
        "norm2": {"scale": whole},
    }
    assert resnet == {
        "conv1": {"kernel": last(4), "bias": last(1)},
        "norm2": {"scale": last(1), "bias": last(1)},
        "conv2": {"kernel": PartitionSpec(None, None, "tensor", None), "bias": whole},
        "conv_shortcut": {"kernel": whole},
    }
    assert odd == {"conv1": {"kernel": whole}}
    assert set(jax.tree.leaves(tensor_specs(params, 1))) == {whole}


def test_shard_batch_on_one_device():
    batch = shard_batch(make_mesh(), jnp.ones((3, 2)))
    assert batch.shape == (3, 2)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, Processes("slurm")),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Processes("gke")),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}, Processes("gke")),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Processes("ompi")),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            Processes("address", "a:1", 2, 1),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a-0:12", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            Processes("address", "a-0:12", 4, 3),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_processes_are_found(environ, found):
    assert find_processes(environ=environ) == found


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((None, 2, 0), {}, "coordinator_address is None"),
        (("host", 2, 0), {}, "coordinator address is 'host'; it must be host:port"),
        (("host:1", 2, 2), {}, "process id is 2; it must be in"),
        (("host:1", 0, 0), {}, "number of processes is 0"),
        (("host:1", None, 0), {}, "JAX_NUM_PROCESSES is None"),
        (("host:1", 2, None), {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first'"),
        ((), {"OMPI_COMM_WORLD_SIZE": "2"}, "JAX_COORDINATOR_ADDRESS is None"),
    ],
)
def test_incomplete_processes(arguments, environ, message):
    with pytest.raises(ValueError, match=message):
        find_processes(*arguments, environ=environ)


def test_a_lone_process_starts_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "TPU_WORKER_ID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert start_processes() is None
    assert not jax.distributed.is_initialized()


def test_devices_take_a_batch_that_they_divide():
    devices = jax.local_devices()
    for count, taken in ((2 * len(devices), devices), (2 * len(devices) + 1, devices[:1])):
        mesh = data_mesh(count)
        assert mesh.devices.tolist() == taken and mesh.axis_names == ("data",)
    assert data_mesh(3, devices[:1]).size == 1
    assert mesh_of(devices[:1], {"data": 1, "tensor": 1}).shape == {"data": 1, "tensor": 1}
