"""Reading compiled modules: trip counts, work of loops against XLA's own counts, collectives."""

import jax
import jax.numpy as jnp
import pytest

from megjax import hlo
from megjax.cost import cost_of_compiled


def compiled(fn, *shapes):
    return jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


PROGRAMS = {
    "product": (lambda a, b: a @ b, (64, 128), (128, 32)),
    "batched": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 8, 16), (4, 16, 32)),
    "convolution": (conv, (2, 16, 16, 8), (3, 3, 8, 4)),
    "strided": (lambda x, k: conv(x, k, window_strides=(2, 2), padding=((0, 1), (0, 1))), (2, 16, 16, 8), (3, 3, 8, 4)),
    "dilated": (lambda x, k: conv(x, k, lhs_dilation=(2, 2), padding=((1, 2), (1, 2))), (1, 8, 8, 8), (3, 3, 8, 4)),
    "elementwise": (lambda a, b: a * b + 1.0, (64, 64), (64, 64)),
    "sum": (lambda a: a.sum(), (64, 64)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_counts_agree_with_xla_where_nothing_loops(name):
    fn, *shapes = PROGRAMS[name]
    program = compiled(fn, *shapes)
    work, own = hlo.Module(program.as_text()).work(repeat=True), program.cost_analysis()
    assert work.flops == pytest.approx(own["flops"], rel=0.01)
    assert work.bytes == pytest.approx(own["bytes accessed"], rel=0.01)


def test_loops_are_repeated():
    """Ten passes of four products and a tanh, against the products alone."""

    def inner(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, 4)[0]

    def outer(x):
        return jax.lax.scan(lambda x, _: (inner(x), None), x, None, 10)[0]

    program = compiled(outer, (64, 64))
    module = hlo.Module(program.as_text())
    assert sorted(loop.trip_count for loop in module.loops()) == [4, 10]
    once, repeated = (cost_of_compiled(program, repeat_loops=repeat).flops for repeat in (False, True))
    assert once == pytest.approx(2 * 64**3, rel=0.05)
    assert repeated == pytest.approx(40 * 2 * 64**3, rel=0.05)


def test_a_loop_that_reads_slices_moves_them_and_not_the_whole():
    def total(x):
        return jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros_like(x[0]), x)[0]

    program = compiled(total, (100, 1000))
    moved = cost_of_compiled(program, repeat_loops=True).bytes_accessed
    assert 3 * 4e5 < moved < 12 * 4e5  # a few times the 400 kB of x, not a hundred times


def test_loops_of_unknown_length_count_once():
    def search(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1e-3, lambda x: x @ x, x)

    module = hlo.Module(compiled(search, (32, 32)).as_text())
    assert [loop.trip_count for loop in module.loops()] == [None]
    assert module.work(repeat=True) == module.work(repeat=False)


TEXT = """ENTRY %main (p: bf16[4,8]) -> f32[2] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %ag-start = (bf16[4,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %ag-done = bf16[16,8]{1,0} all-gather-done(%ag-start)
  %a = f32[10]{0} constant({...})
  %b = f32[6]{0} constant({...})
  %ar = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
  %c = f32[4]{0} constant({...})
  ROOT %rs = f32[2]{0} reduce-scatter(%c), replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}
}
"""


def test_collectives_in_a_text():
    assert hlo.Module(TEXT).work(repeat=True).collectives == (
        ("all-gather", 256.0, 4.0, 1),
        ("all-reduce", 64.0, 4.0, 1),
        ("reduce-scatter", 16.0, 2.0, 1),
    )


KERNELS = """ENTRY %main (q: bf16[2,3,64,40]) -> bf16[2,3,64,40] {
  %q = bf16[2,3,64,40]{3,2,1,0} parameter(0)
  %k = bf16[2,3,32,40]{3,2,1,0} parameter(1)
  %out = bf16[2,3,64,40]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"7000","transcendentals":"5"}}}
  %flash_mha_bwd_dkv_block_q.1 = bf16[2,3,64,40]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %flash_mha_bwd_dq_block_q.1 = bf16[2,3,64,40]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", backend_config={}
}
"""  # noqa: E501


def test_operations_of_kernels():
    """Those that a kernel states, and the products of those that state none."""
    work = hlo.Module(KERNELS).work(repeat=True)
    assert work.flops == 7000 and work.unseen == (4 + 3) * 2 * (2 * 3) * 64 * 32 * 40


PLACES = """%fused (table: f32[100,8], index: s32[5]) -> f32[5,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %index = s32[5]{0:S(1)} parameter(1)
  ROOT %g = f32[5,8]{1,0} gather(%table, %index), offset_dims={1}
}

ENTRY %main (x: f32[100,8], i: s32[5]) -> f32[5,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[5]{0:S(1)} parameter(1)
  %near = (f32[100,8]{1,0:S(1)}, f32[100,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near-done = f32[100,8]{1,0:S(1)} copy-done(%near)
  %part = (f32[100,8]{1,0}, f32[10,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:10], [0:8]}
  %part-done = f32[10,8]{1,0:S(1)} slice-done(%part)
  %mine = f32[2,8]{1,0} slice(%near-done), slice={[0:2], [0:8]}
  %sum = f32[10,8]{1,0} add(%part-done, %part-done), metadata={op_name="jit(main)/transpose(jvp())/mul.1"}
  ROOT %rows = f32[5,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(main)/gather"}
}
"""


def test_only_main_memory_counts_and_gathers_read_what_they_return():
    module = hlo.Module(PLACES)
    causes = {"copy": 3200.0, "slice-start": 320.0, "gradient of mul": 320.0, "gather": 320.0, "slice": 64.0}
    assert module.causes() == causes
    assert module.work(repeat=True).bytes == sum(causes.values())


CHOICES = """%dear (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = f32[64]{0} negate(%x)
  ROOT %z = f32[64]{0} negate(%y)
}

%cheap (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %w = f32[64]{0} negate(%x)
}

ENTRY %main (p: pred[], x: f32[64]) -> f32[64] {
  %p = pred[] parameter(0)
  %x = f32[64]{0} parameter(1)
  %chosen = f32[64]{0} conditional(%p, %x, %x), true_computation=%dear, false_computation=%cheap
  %ag = (f32[64]{0}, f32[256]{0}) all-gather-start(%chosen), replica_groups={{0,1,2,3}}
  ROOT %whole = f32[256]{0} all-gather-done(%ag)
}
"""


def test_a_choice_moves_what_its_cheapest_branch_moves_and_a_gather_its_two_sides():
    module = hlo.Module(CHOICES)
    assert module.work(repeat=True).bytes == 2 * 256 + 256 + 1024 == sum(module.causes().values())


@pytest.mark.parametrize("name", PROGRAMS)
def test_causes_sum_to_all_bytes(name):
    fn, *shapes = PROGRAMS[name]
    module = hlo.Module(compiled(lambda *x: jax.grad(lambda *y: jnp.sum(fn(*y)))(*x), *shapes).as_text())
    assert sum(module.causes().values()) == module.work(repeat=True).bytes > 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("bf16[3,40]{1,0:T(8,128)(2,1)}", 2048),
        ("f32[40,3,9]{0,2,1:T(8,128)}", 3 * 16 * 128 * 4),
        ("(f32[40,3,9]{0,2,1:T(8,128)S(1)}, f32[8]{0:S(0)}, u32[]{:S(2)})", 32),
        ("(f32[2], /*index=1*/s4[6]{0}, pred[])", 12),
        ("s4[8,128]{1,0:T(8,128)(2,1)E(4)}", 512),
        ("s4[8,128]{1,0:T(8,128)(2,1)E(4)S(1)}", 0),
        ("c64[3]", 24),
        ("f8e4m3fn[5]", 5),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.array_bytes(shape) == size
