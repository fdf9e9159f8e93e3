"""Arrays, images and convolutions over several devices, and two processes that make one mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megjax.diffusion import layers, strips
from megjax.diffusion.pipeline import StableDiffusion
from megjax.sharding import MeshConfig, fsdp_shardings, make_mesh, shard_batch, start_processes, tensor_shardings
from tests.checks import fast_compile

pytestmark = pytest.mark.slow


def one_image_by_four_devices():
    """A guided image by one device, and by two devices for each of the pair of latents."""
    model = StableDiffusion.from_pretrained("scenes")
    ids, key = model.tokenize(["a red house under a night sky"]), jax.random.key(0)
    with fast_compile():
        one = np.asarray(model.generate(key, ids, num_steps=2))
        mesh = make_mesh(MeshConfig(data=2, tensor=2))
        model.params = jax.device_put(model.params, tensor_shardings(mesh, model.params))
        with jax.set_mesh(mesh):
            four = np.asarray(model.generate(key, ids, num_steps=2))
    kernels = [x for x in jax.tree.leaves(model.params["unet"]) if x.ndim > 1]
    assert sum(not x.sharding.is_fully_replicated for x in kernels) > len(kernels) / 2
    assert np.abs(four - one).max() < 1e-4


def test_one_image_by_four_devices_is_that_of_one(processes):
    processes.run(one_image_by_four_devices, devices=4)


def placement_on_eight_devices():
    mesh = make_mesh(MeshConfig(fsdp=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    params = jax.device_put({"w": jnp.ones((256, 128))}, fsdp_shardings(mesh, {"w": jnp.ones((256, 128))}))
    assert params["w"].sharding.shard_shape((256, 128)) == (64, 128)
    batch = shard_batch(mesh, {"x": np.arange(32.0).reshape(16, 2)})
    assert batch["x"].sharding.shard_shape((16, 2)) == (2, 2) and float(batch["x"].sum()) == 496
    with pytest.raises(ValueError, match="batch is 12; it must be a multiple of data x fsdp, 8"):
        shard_batch(mesh, np.ones((12, 2)))


def test_placement_on_eight_devices(processes):
    processes.run(placement_on_eight_devices, devices=8)


def sum_of_a_shared_batch():
    """Two processes of two devices each sum a batch of which each holds one half."""
    start_processes()
    mesh = make_mesh()
    batch = shard_batch(mesh, np.full((2, 3), jax.process_index() + 1.0))
    assert batch.shape == (4, 3) and dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    assert float(jax.jit(jnp.sum)(batch)) == 18


def test_two_processes_make_one_mesh(processes):
    for process in processes.start_job(sum_of_a_shared_batch, devices=2):
        process.finish()


def convolutions_on_two_devices():
    strips.MANY_ELEMENTS = 1
    mesh = Mesh(np.array(jax.devices()), ("data",))
    images, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    norm = layers.GroupNorm(64, 8, 1e-5, rngs=nnx.Rngs(0))
    conv, up = layers.conv(64, 64, 3, jnp.float32, nnx.Rngs(0)), layers.Upsample2D(64, jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split((norm, conv, up))

    def run(state, x):
        norm, conv, up = nnx.merge(graph, state)
        return up(layers.norm_silu_conv(norm, conv, x))

    x = jax.ShapeDtypeStruct((4, 8, 8, 64), jnp.float32, sharding=images)
    state = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere), state)
    for fn in (run, lambda state, x: layers.winograd(x, state[1]["kernel"][...])):
        text = jax.jit(fn, out_shardings=images).lower(state, x).compile().as_text()
        assert not re.findall("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text)


def test_convolutions_ask_nothing_of_other_cpu_devices(processes):
    """Images on two devices, weights on both: what a CPU does in another way must leave every image where it is."""
    processes.run(convolutions_on_two_devices, devices=2)
