"""Attention by every kernel gives what the formula gives, in values and gradients, and each platform has its own."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from megjax import hlo
from megjax.diffusion import attention
from megjax.sharding import AXES
from megjax.tpu import TpuConfig
from tests.checks import arrays, both, needs_libtpu, value_and_gradients

pytestmark = pytest.mark.usefixtures("fast_compile")
FOLDER = Path(__file__).parents[2] / "tpu_configs"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def half(*args):
    return [x.astype(jnp.bfloat16) for x in args]


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize(
    ("queries", "keys", "size"),
    [(256, 256, 40), slow(200, 77, 64), slow(128, 384, 80), slow(128, 256, 160), slow(128, 128, 512)],
)
def test_flash_kernel(monkeypatch, queries, keys, size):
    """In Pallas' interpreter of TPUs: several blocks, padded tokens, padded heads."""
    monkeypatch.setattr(attention, "_FLASH_QUERIES", 128)
    monkeypatch.setattr(attention, "_FLASH_KEYS", 128)
    args = arrays(7, *((2, number, 1, size) for number in (queries, keys, keys)))
    exact = jax.jit(partial(value_and_gradients, jax.nn.dot_product_attention))(*args)
    plain = jax.jit(partial(value_and_gradients, jax.nn.dot_product_attention))(*half(*args))
    with force_tpu_interpret_mode():
        found = jax.jit(partial(value_and_gradients, attention._flash))(*half(*args))
    for kernel, formula, expected in zip(found, plain, exact, strict=True):
        errors = [np.abs(x.astype(jnp.float32) - expected).max() / np.abs(expected).max() for x in (kernel, formula)]
        assert kernel.dtype == jnp.bfloat16 and errors[0] < max(2 * errors[1], 0.01)


def program_for_tpu(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "options", "kernels"),
    [
        (1024, 1024, jnp.bfloat16, {}, 1),
        (1024, 1024, jnp.bfloat16, {"upcast": True}, 1),
        (1024, 1024, jnp.float32, {}, 0),
        (1024, 1024, jnp.float16, {}, 0),
        (1024, 77, jnp.bfloat16, {}, 0),
        (256, 256, jnp.bfloat16, {}, 0),
    ],
)
def test_a_tpu_has_the_flash_kernel_for_many_tokens_in_bfloat16(queries, keys, dtype, options, kernels):
    query, key = (jax.ShapeDtypeStruct((2, tokens, 80), dtype) for tokens in (queries, keys))
    attend = partial(attention.attend, num_heads=2, **options)
    assert program_for_tpu(attend, query, key, key).count("@tpu_custom_call") == kernels

    def loss(*args):
        return attend(*args).astype(jnp.float32).sum()

    assert program_for_tpu(jax.grad(loss, (0, 1, 2)), query, key, key).count("@tpu_custom_call") == 3 * kernels


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "heads", "size"),
    [("v5e-4", 4, 40), *((name, 1, 512) for name in ("v4-4", "v5e-4", "v5p-4", "v6e-8", "tpu7x-4"))],
)
def test_every_tpu_compiles_the_kernel_and_its_gradient(name, heads, size):
    """In a small part of the memory that logits would take."""
    device = SingleDeviceSharding(TpuConfig.from_file(FOLDER / f"{name}.json").devices()[0])
    x = jax.ShapeDtypeStruct((1, 2048, heads * size), jnp.bfloat16, sharding=device)

    def loss(*args):
        return attention.attend(*args, num_heads=heads).astype(jnp.float32).sum()

    quick = {"exec_time_optimization_effort": -1.0}
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile(compiler_options=quick)
    assert hlo.Module(compiled.as_text()).work(repeat=True).unseen == 7 * 2 * heads * 2048**2 * size
    assert compiled.memory_analysis().temp_size_in_bytes < heads * 2048**2 * 4


def attend_to_itself(x):
    return attention.attend(x, x, x, num_heads=4)


def test_each_device_runs_the_kernel_on_its_own_images_and_heads():
    x = jax.ShapeDtypeStruct((4, 1024, 4 * 40), jnp.bfloat16)
    mesh = AbstractMesh((2, 1, 2), AXES)
    with jax.sharding.use_abstract_mesh(mesh):
        automatic = program_for_tpu(attend_to_itself, x)
    split = partial(jax.shard_map, attend_to_itself, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    local = program_for_tpu(split(check_vma=False), x)
    for text, shape in ((automatic, "2x2x1024x40xbf16"), (local, "2x4x1024x40xbf16")):
        call = next(line for line in text.splitlines() if "@tpu_custom_call" in line)
        assert f"-> tensor<{shape}>" in call, call[-200:]
    assert "@tpu_custom_call" not in program_for_tpu(split(check_vma=True), x)


@pytest.mark.parametrize("mesh", [AbstractMesh((2,), ("mine",)), AbstractMesh((2,), ("data",), (AxisType.Explicit,))])
def test_no_kernel_where_shares_are_unknown(mesh):
    x = jax.ShapeDtypeStruct((4, 1024, 4 * 40), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "@tpu_custom_call" not in program_for_tpu(attend_to_itself, x)


@pytest.mark.parametrize("part", [slow(1), 3, 7])
def test_attention_of_float32_by_parts_of_queries(monkeypatch, part):
    """The last part is short; half precision is left to the compiler."""
    args = arrays(12, (2, 7, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4))
    plain, parts = jax.nn.dot_product_attention, lambda *args: attention._attend_whole(*args)  # never traced before
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", part * 2 * 3 * 5)
    assert ("while" in jax.jit(parts).lower(*args).as_text()) == (part < 7)
    assert max(both(plain, parts, *args)) < 1e-5
    half = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in args)
    assert "while" not in jax.jit(parts).lower(*half).as_text()


def test_upcast_attention_of_a_tpu_goes_by_parts(monkeypatch):
    """As in Stable Diffusion 2.1, whose half-precision features ask for float32 logits."""
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", 2 * 2 * 600)
    x = jax.ShapeDtypeStruct((1, 600, 8), jnp.bfloat16)
    for upcast in (False, True):
        attend = jax.jit(partial(attention.attend, num_heads=2, upcast=upcast))
        text = attend.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
        assert ("while" in text) == upcast


@pytest.mark.parametrize(("queries", "keys", "of_a_part"), [(1030, 300, 1 << 17), slow(4, 1 << 17, 1 << 19)])
def test_attention_in_parts(monkeypatch, queries, keys, of_a_part):
    """Also with a last part that is not full, and with gradients."""
    monkeypatch.setattr(attention, "_LOGITS_OF_A_PART", of_a_part)
    assert queries * keys >= attention.MANY_LOGITS
    args = arrays(2, *((1, number, 2, 4) for number in (queries, keys, keys)))
    assert max(both(jax.nn.dot_product_attention, attention._attend_in_parts, *args)) < 2e-5


def test_bfloat16_attention_in_parts():
    @jax.jit
    def run(*whole):
        half = attention._attend_in_parts(*(x.astype(jnp.bfloat16) for x in whole))
        return half, jax.nn.dot_product_attention(*whole)

    half, exact = run(*arrays(3, *[(1, 600, 2, 8)] * 3))
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("size", "dtype", "fused"), [(40, jnp.bfloat16, True), (40, jnp.float32, False), (36, jnp.bfloat16, False)]
)
def test_a_gpu_has_fused_attention_in_half_precision(monkeypatch, size, dtype, fused):
    """In the program for a GPU, made without one: JAX's questions to cuDNN are answered here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for tokens in (64, 1024):
        x = jax.ShapeDtypeStruct((1, tokens, 2 * size), dtype)
        traced = jax.jit(lambda x: attention.attend(x, x, x, 2)).trace(x)
        assert ("fmhaSoftmax" in traced.lower(lowering_platforms=("cuda",)).as_text()) == fused
        assert "fmhaSoftmax" not in traced.lower(lowering_platforms=("tpu",)).as_text()
