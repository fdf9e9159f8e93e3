"""Convolutions that a CPU computes in another way give what the plain ones give, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion import layers


def both(plain, fused, x, kernel):
    """Values and gradients of a nonlinear function of both, largest difference against the largest value."""

    def loss(fn):
        return lambda x, kernel: jnp.sum(jnp.sin(fn(x, kernel)))

    values = [jax.jit(fn)(x, kernel) for fn in (plain, fused)]
    slopes = [jax.jit(jax.grad(loss(fn), (0, 1)))(x, kernel) for fn in (plain, fused)]
    for a, b in [values, *zip(*slopes, strict=True)]:
        yield float(jnp.abs(a - b).max() / jnp.abs(a).max())


@pytest.mark.parametrize("shape", [(2, 4, 4, 8), (1, 3, 5, 2), (1, 1, 1, 3)])
def test_doubling_by_phases(shape):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((3, 3, shape[-1], 6))
    kernel = jnp.asarray(kernel, jnp.float32)
    assert layers._double_by_phases(jnp.asarray(x), kernel).shape == (shape[0], 2 * shape[1], 2 * shape[2], 6)
    assert max(both(layers._double, layers._double_by_phases, jnp.asarray(x), kernel)) < 1e-5


@pytest.mark.parametrize("outputs", [1, 3, 4])
def test_added_taps(outputs):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 5, 7, 8)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 8, outputs)), jnp.float32)
    assert max(both(layers._convolve, layers._added_taps, x, kernel)) < 1e-5


def test_layers_are_the_plain_ones_with_bias_and_dtype():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 8))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        up = layers.Upsample2D(8, dtype, rngs=nnx.Rngs(0))
        narrow = layers.narrow_conv(8, 3, dtype, nnx.Rngs(1))
        for layer, wide in ((up, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)), (narrow, x)):
            plain = getattr(layer, "conv", layer)
            plain.bias[...] = jax.random.normal(jax.random.key(1), plain.bias[...].shape)
            expected = nnx.Conv.__call__(plain, wide)
            found = layer(x)
            assert found.dtype == expected.dtype == dtype
            assert float(jnp.abs(found - expected).max()) < tolerance * float(jnp.abs(expected).max())


def test_other_sizes_are_taken_as_they_are():
    up, x = layers.Upsample2D(4, jnp.float32, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    assert up(x, (5, 6)).shape == (1, 5, 6, 4)
    np.testing.assert_allclose(up(x, (6, 6)), up(x), rtol=1e-6)
