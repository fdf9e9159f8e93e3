"""Costs of compiled programs: XLA's counts, how they compose, collectives, and rooflines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.interpreters import pxla
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megjax.cost import CHIPS, Chip, Collective, Cost, Memory, cost_of, find_chip, nominal_flops, roofline, shapes_of
from megjax.diffusion.layers import conv


def matrix(m, n, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((m, n), dtype)


def test_matrix_product_takes_2mnk_operations():
    cost = cost_of(lambda a, b: a @ b, matrix(64, 128), matrix(128, 32))
    assert cost.flops == 2 * 64 * 128 * 32
    assert cost.bytes_accessed == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert (cost.memory.arguments, cost.memory.outputs) == (4 * (64 * 128 + 128 * 32), 4 * 64 * 32)
    assert cost.collectives == ()


def test_nominal_operations_are_those_of_the_layers_on_every_machine():
    graph, state = nnx.split(nnx.eval_shape(lambda: conv(128, 64, 3, jnp.float32, nnx.Rngs(0))))
    arguments = state, jax.ShapeDtypeStruct((2, 16, 16, 128), jnp.float32)

    def layer(state, x):
        return nnx.merge(graph, state)(x)

    # Windows at the border see padding, which XLA does not count.
    taps = (3 * 16 - 2) ** 2
    nominal = nominal_flops(layer, *arguments)
    assert nominal == pytest.approx(2 * 2 * taps * 128 * 64, rel=1e-2)
    assert cost_of(layer, *arguments).flops < 0.6 * nominal


def test_nominal_operations_are_counted_by_the_cpu_backend(monkeypatch):
    """Plugins, as for GPUs and TPUs, have no analysis of a program that is not compiled."""
    used, analyse = [], pxla.MeshComputation.cost_analysis

    def counted(self):
        used.append(self.compile_args["backend"].platform)
        return analyse(self)

    monkeypatch.setattr(pxla.MeshComputation, "cost_analysis", counted)
    assert nominal_flops(lambda a, b: a @ b, matrix(64, 128), matrix(128, 32)) == 2 * 64 * 128 * 32
    assert used == ["cpu"]

    def without(backend):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", without)
    with pytest.raises(ValueError, match="add cpu to JAX_PLATFORMS"):
        nominal_flops(lambda a: a, matrix(2, 2))


def test_a_loop_body_counts_once_and_composition_multiplies():
    def step(x):
        return x @ x

    def repeated(x, num_steps):
        return jax.lax.scan(lambda x, _: (step(x), None), x, None, num_steps)[0]

    ten, hundred = (cost_of(repeated, matrix(64, 64), num_steps=n).flops for n in (10, 100))
    once = cost_of(step, matrix(64, 64))
    assert ten == hundred == pytest.approx(once.flops, rel=1e-3)
    assert (once * 10).flops == (10 * once).flops == 10 * once.flops


def test_jitted_functions_and_arrays_are_taken_as_they_are():
    x = jnp.ones((8, 8))
    donated = cost_of(jax.jit(lambda x: x + 1, donate_argnums=0), shapes_of(x))
    assert donated.memory.aliased == 256 and donated.memory.total == 256 + donated.memory.code
    assert cost_of(lambda x: x @ x, x).flops == 2 * 8**3


def test_costs_add_and_memory_is_the_largest():
    gather = Collective("all-gather", 1, 80, 70)
    first = Cost(10.0, 100.0, (gather,), Memory(arguments=5, temporaries=5))
    second = Cost(1.0, 10.0, (Collective("all-reduce", 2, 8, 14), gather), Memory(arguments=20, aliased=3))
    total = first * 3 + second
    assert (total.flops, total.bytes_accessed) == (31.0, 310.0)
    assert total.collectives == (Collective("all-reduce", 2, 8, 14), Collective("all-gather", 4, 320, 280))
    assert total.bytes_sent == 294 and total.memory == second.memory and total.memory.total == 17
    assert (first * 0).flops == 0 and (first * 0).collectives == ()
    with pytest.raises(ValueError, match="number of runs is -1"):
        first * -1
    with pytest.raises(TypeError):
        first * 0.5


def test_roofline_of_a_made_up_chip():
    chip = Chip("made up", flops=100.0, hbm_bandwidth=10.0, hbm_bytes=1.0, ici_bandwidth=2.0, source="here")
    cost = Cost(flops=200.0, bytes_accessed=50.0, collectives=(Collective("all-reduce", 1, 4, 6.0),))
    bounds = roofline(cost, chip)
    assert (bounds.compute, bounds.memory, bounds.interconnect) == (2.0, 5.0, 3.0)
    assert bounds.seconds == 5.0 and bounds.bound == "memory"
    assert roofline(cost, chip, devices_per_chip=2).seconds == 10.0
    with pytest.raises(ValueError, match="devices_per_chip is 0"):
        roofline(cost, chip, 0)


def test_chips():
    assert find_chip("v5e").flops == 197e12
    for chip in CHIPS.values():
        balance = chip.flops / chip.hbm_bandwidth  # operations per byte: 100 to 600 on every chip that is sold
        assert 100 < balance < 600 and chip.ici_bandwidth < chip.hbm_bandwidth and chip.source
    with pytest.raises(ValueError, match="chip is 'v3'"):
        find_chip("v3")


def print_collectives_of_sharded_programs():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, everywhere = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=everywhere)
    def total(x):
        return jax.lax.psum(x, "data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    def whole(x):
        return jax.lax.all_gather(x, "data", tiled=True)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, split))
    for fn in (total, whole):
        print(*((c.kind, int(c.count), int(c.bytes), int(c.sent)) for c in cost_of(fn, x).collectives))


@pytest.mark.slow
def test_collectives_of_a_sharded_program(processes):
    """Four devices hold two rows of 64 bytes each: 128 bytes are reduced, 512 gathered."""
    lines = processes.run(print_collectives_of_sharded_programs, devices=4).splitlines()
    assert lines == ["('all-reduce', 1, 128, 192)", "('all-gather', 1, 512, 384)"]


def test_shapes_of_keeps_types():
    shapes = shapes_of({"a": np.zeros((2, 3), np.int8), "b": matrix(1, 2, jnp.bfloat16)})
    assert shapes["a"].shape == (2, 3) and shapes["a"].dtype == np.int8 and shapes["b"].dtype == jnp.bfloat16
