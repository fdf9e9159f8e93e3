"""Convolutions that a CPU computes in another way give what the plain ones give, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion import layers, strips
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.vae import AutoencoderKL, VAEConfig
from megjax.diffusion.winograd import winograd
from tests.checks import arrays, both

pytestmark = pytest.mark.usefixtures("fast_compile")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("shape", [slow((2, 4, 4, 8)), (1, 3, 5, 2), slow((1, 1, 1, 3))])
def test_doubling_by_phases(shape):
    args = arrays(0, shape, (3, 3, shape[-1], 6))
    assert max(both(layers._double, layers._double_by_phases, *args)) < 1e-5


def test_one_product():
    args = arrays(4, (2, 3, 5, 8), (3, 3, 8, 6))
    assert max(both(layers._convolve, layers._one_product, *args)) < 1e-5


@pytest.mark.parametrize(
    ("way", "height"),
    [slow(winograd, 4), slow(winograd, 7), (layers._one_product, 4), (layers._added_taps, 3)],
)
def test_rows_that_are_not_padded(way, height):
    args = arrays(6, (2, height, 5, 8), (3, 3, 8, 6))
    plain, fused = partial(layers._convolve, pad_rows=False), partial(way, pad_rows=False)
    assert jax.eval_shape(fused, *args).shape == (2, height - 2, 5, 6)
    assert max(both(plain, fused, *args)) < 1e-5


def few(monkeypatch, rows):
    """Everything counts as large; strips of features [6 4 8] have at most this many rows."""
    monkeypatch.setattr(strips, "MANY_ELEMENTS", 1)
    monkeypatch.setattr(strips, "_ELEMENTS_OF_A_STRIP", rows * 4 * 8)


@pytest.mark.parametrize(
    ("make", "rows"),
    [slow(layers.conv, 1), (layers.conv, 4), slow(layers.conv, 6), slow(layers.narrow_conv, 4)],
)
def test_normalised_convolution_in_strips(monkeypatch, rows, make):
    options = (3, jnp.float32, nnx.Rngs(1)) if make is layers.conv else (jnp.float32, nnx.Rngs(1))
    layer, norm = make(8, 5, *options), layers.GroupNorm(8, 2, 1e-5, rngs=nnx.Rngs(0))
    x, layer.bias[...], norm.bias[...] = arrays(7, (2, 6, 4, 8), (5,), (8,))

    def whole(x, kernel):
        return run(nnx.Conv.__call__, x, kernel)

    def in_strips(x, kernel):
        return run(lambda layer, y: layers.norm_silu_conv(norm, layer, x), x, kernel)

    def run(call, x, kernel):
        graph, state = nnx.split(layer)
        state["kernel"] = nnx.Param(kernel)
        return call(nnx.merge(graph, state), nnx.silu(norm(x)))

    few(monkeypatch, rows)
    assert "while" in jax.jit(in_strips).lower(x, layer.kernel[...]).as_text()
    assert max(both(whole, in_strips, x, layer.kernel[...])) < 1e-5


def test_gradients_of_a_norm_in_strips(monkeypatch):
    layer, norm = layers.conv(8, 5, 3, jnp.float32, nnx.Rngs(1)), layers.GroupNorm(8, 2, 1e-5, rngs=nnx.Rngs(0))
    x, norm.scale[...], norm.bias[...], weights = arrays(11, (2, 6, 4, 8), (8,), (8,), (2, 6, 4, 5))
    graph, state = nnx.split(norm)

    def gradients():
        def loss(state):
            return (weights * layers.norm_silu_conv(nnx.merge(graph, state), layer, x)).sum()

        return jax.jit(jax.grad(loss))

    plain = jax.tree.leaves(gradients()(state))
    few(monkeypatch, 2)
    in_strips = gradients().lower(state)
    assert "while" in in_strips.as_text()
    for found, expected in zip(jax.tree.leaves(in_strips.compile()(state)), plain, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [slow(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_wide_convolution_in_strips(monkeypatch, dtype, tolerance):
    """Winograd's in float32; the last strip of seven rows makes some again."""
    monkeypatch.setattr(strips, "MANY_ELEMENTS", 1)
    monkeypatch.setattr(strips, "_ELEMENTS_OF_A_STRIP", 4 * 5 * 64)
    layer, norm = layers.conv(64, 64, 3, dtype, nnx.Rngs(1)), layers.GroupNorm(64, 8, 1e-5, dtype, rngs=nnx.Rngs(0))
    (x,) = arrays(10, (2, 7, 5, 64))

    @jax.jit
    def run(x):
        return layers.norm_silu_conv(norm, layer, x.astype(dtype)), layer(nnx.silu(norm(x)))

    found, expected = run(x)
    assert found.dtype == dtype and found.shape == x.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize("rows", [slow(1), slow(3), 4])
def test_doubling_in_strips(monkeypatch, rows):
    args, by_strips = arrays(8, (2, 6, 4, 8), (3, 3, 8, 5), (5,)), layers._double_by_strips
    few(monkeypatch, rows)
    monkeypatch.setattr(layers, "_double_by_strips", lambda *args: by_strips(*args))  # never traced before
    assert "while" in jax.jit(lambda *args: layers.double(*args)).lower(*args).as_text()

    def plain(x, kernel, bias):
        return layers._double(x, kernel) + bias[None, None, None]

    assert max(both(plain, layers.double, *args)) < 1e-5


def test_a_decoder_takes_strips_only_of_large_images(monkeypatch):
    vae = nnx.eval_shape(lambda: AutoencoderKL(VAEConfig(block_out_channels=(8,), norm_num_groups=2), rngs=ShapeRngs()))
    graph, params = nnx.split(vae)
    z = jax.ShapeDtypeStruct((1, 6, 4, 4), jnp.float32)

    def program():
        return jax.jit(lambda params, z: nnx.merge(graph, params).decode(z)).lower(params, z).as_text()

    plain = program()
    few(monkeypatch, 2)
    assert "while" not in plain and "while" in program()


@pytest.mark.parametrize("shape", [(2, 4, 7, 8), slow((1, 5, 6, 2)), slow((1, 1, 1, 3))])
def test_winograd(shape):
    args = arrays(5, shape, (3, 3, shape[-1], 6))
    assert max(both(layers._convolve, winograd, *args)) < 1e-5
    # Nothing but rounding: in float64 both are the same.
    with jax.enable_x64(True):
        exact = [np.asarray(value, np.float64) for value in args]
        found, expected = jax.jit(lambda *args: (winograd(*args), layers._convolve(*args)))(*exact)
    assert found.dtype == np.float64 and found.shape == (*shape[:3], 6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "side", "inputs", "outputs", "name"),
    [
        (2, 8, 512, 8, "_one_product"),
        (2, 9, 512, 8, "_convolve"),
        (2, 9, 256, 256, "winograd"),
        (5, 8, 64, 64, "winograd"),
        (6, 8, 64, 64, "_convolve"),
        (2, 8, 64, 63, "_convolve"),
    ],
)
def test_every_way_of_a_convolution(monkeypatch, batch, side, inputs, outputs, name):
    """Which way is taken, and that it gives what the plain one gives."""
    monkeypatch.setattr(layers, "_TILE_BYTES", 5 * 16 * 8 * 8 * 64)
    plain, way, taken = layers._convolve, getattr(layers, name), []
    monkeypatch.setattr(layers, name, lambda *args, **options: (taken.append(name), way(*args, **options))[1])
    args = arrays(side, (batch, side, side, inputs), (3, 3, inputs, outputs))

    @jax.jit
    def run(x, kernel):
        kernel /= 3 * np.float32(np.sqrt(inputs))
        return layers.conv3x3(x, kernel), plain(x, kernel)

    np.testing.assert_allclose(*run(*args), rtol=1e-4, atol=1e-4)
    assert taken
    half = (jax.ShapeDtypeStruct(value.shape, jnp.bfloat16) for value in args)
    assert jax.eval_shape(lambda *args: layers.conv3x3(*args), *half).dtype == jnp.bfloat16


def test_other_convolutions_are_plain():
    for options in ({"stride": 2}, {"padding": ((0, 1), (0, 1))}):
        assert type(layers.conv(512, 4, 3, jnp.float32, nnx.Rngs(0), **options)) is nnx.Conv


def test_doubling_of_very_many_channels():
    args = arrays(14, (1, 5, 4, 1024), (3, 3, 1024, 64), (64,))

    @jax.jit
    def run(x, kernel, bias):
        kernel /= 3 * np.float32(np.sqrt(1024))
        return layers.double(x, kernel, bias), layers._double(x, kernel) + bias[None, None, None]

    np.testing.assert_allclose(*run(*args), atol=1e-4)


@pytest.mark.parametrize("outputs", [slow(1), 3, slow(4)])
def test_added_taps(outputs):
    assert max(both(layers._convolve, layers._added_taps, *arrays(1, (2, 5, 7, 8), (3, 3, 8, outputs)))) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_layers_are_the_plain_ones_with_bias_and_dtype(dtype, tolerance):
    x, *biases = arrays(0, (1, 4, 6, 8), (8,), (3,))
    up, narrow = layers.Upsample2D(8, dtype, rngs=nnx.Rngs(0)), layers.narrow_conv(8, 3, dtype, nnx.Rngs(1))
    up.conv.bias[...], narrow.bias[...] = biases

    @jax.jit
    def run(x):
        return (up(x), nnx.Conv.__call__(up.conv, layers._repeat(x))), (narrow(x), nnx.Conv.__call__(narrow, x))

    for found, expected in run(x):
        assert found.dtype == expected.dtype == dtype
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_other_sizes_are_taken_as_they_are():
    up, (x,) = layers.Upsample2D(4, jnp.float32, rngs=nnx.Rngs(0)), arrays(15, (1, 3, 3, 4))
    other, doubled, plain = jax.jit(lambda x: (up(x, (5, 6)), up(x, (6, 6)), up(x)))(x)
    assert other.shape == (1, 5, 6, 4)
    np.testing.assert_allclose(doubled, plain, rtol=1e-6)


def test_winograd_is_traced_once_a_shape(monkeypatch):
    traced, stack = [], layers.winograd.__wrapped__

    def count(x, kernel, pad_rows=True):
        traced.append(x.shape)
        return stack(x, kernel, pad_rows)

    counted = jax.jit(count, static_argnames="pad_rows")
    monkeypatch.setattr(layers, "winograd", counted)
    x, kernel = arrays(13, (1, 4, 4, 256), (3, 3, 256, 256))
    program = jax.jit(lambda x, kernel: layers.conv3x3(layers.conv3x3(x, kernel), kernel)).lower(x, kernel)
    assert len(traced) == 1 and program.as_text().count("call @count") == 2
