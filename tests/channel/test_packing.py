"""Tests of the packing of reals into the symbols of the fading blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, block_mask, pack, radiated_energy, symbols_per_block, unpack

SIZES = [(16, 4), (16, 8), (22, 4), (23, 4), (7, 3), (2, 1), (1, 1), (127, 10)]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_values", "num_blocks"), SIZES)
def test_round_trip(num_values, num_blocks, mapping):
    values = jax.random.normal(jax.random.key(0), (num_values,))
    num_symbols = (num_values + 1) // 2
    symbols = pack(values, num_blocks, mapping)
    mask = block_mask(num_symbols, num_blocks)
    assert symbols.shape == mask.shape and symbols.dtype == jnp.complex64
    assert mask.sum() == num_symbols
    np.testing.assert_array_equal(np.asarray(symbols)[~mask], 0)
    # Noise in the empty slots must not reach the values.
    np.testing.assert_allclose(unpack(jnp.where(mask, symbols, 9.0), num_values, mapping), values, rtol=1e-6)
    np.testing.assert_allclose(np.sum(np.abs(symbols) ** 2), np.sum(np.asarray(values) ** 2) / 2, rtol=1e-5)


def test_where_each_symbol_goes():
    values = np.sqrt(2) * jnp.arange(10.0)  # symbols (0 1), (2 3), (4 5), (6 7), (8 9) of which the real part is shown
    ordered, interleaved = (np.asarray(pack(values, 3, mapping).real) for mapping in MAPPINGS)
    np.testing.assert_allclose(ordered, [[0, 2], [4, 6], [8, 0]], rtol=1e-6)
    np.testing.assert_allclose(interleaved, [[0, 6], [2, 8], [4, 0]], rtol=1e-6)
    np.testing.assert_array_equal(symbols_per_block(5, 3), [2, 2, 1])
    np.testing.assert_array_equal(block_mask(5, 3), [[1, 1], [1, 1], [1, 0]])


def test_unit_variance_values_give_unit_power_symbols():
    power = np.abs(np.asarray(pack(jax.random.normal(jax.random.key(1), (40_000,)), 4))) ** 2
    assert abs(power.mean() - 1) <= 4 * power.std(ddof=1) / np.sqrt(power.size)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_vmap_and_jit_agree_with_the_loop(mapping):
    batch = jax.random.normal(jax.random.key(2), (3, 13))
    mapped = jax.jit(jax.vmap(lambda values: pack(values, 3, mapping)))(batch)
    np.testing.assert_allclose(mapped, np.stack([pack(values, 3, mapping) for values in batch]), rtol=1e-6)
    back = jax.jit(jax.vmap(lambda symbols: unpack(symbols, 13, mapping)))(mapped)
    np.testing.assert_allclose(back, batch, rtol=1e-6)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_gradient_of_the_round_trip(mapping):
    values = jax.random.normal(jax.random.key(3), (11,))
    gradient = jax.grad(lambda x: jnp.sum(unpack(pack(x, 4, mapping), 11, mapping) ** 2))(values)
    np.testing.assert_allclose(gradient, 2 * values, rtol=1e-5)


@pytest.mark.parametrize(("num_symbols", "num_blocks"), [(32, 4), (33, 4), (35, 8)])
def test_energy_budget(num_symbols, num_blocks):
    equal = jnp.full(num_blocks, 0.7)
    np.testing.assert_allclose(radiated_energy(equal, num_symbols, num_blocks), 0.7 * num_symbols, rtol=1e-6)
    power = jax.random.exponential(jax.random.key(4), (num_blocks,))
    symbols = jnp.sqrt(power)[:, None] * block_mask(num_symbols, num_blocks)
    np.testing.assert_allclose(radiated_energy(power, num_symbols, num_blocks), jnp.sum(symbols**2), rtol=1e-5)


def test_bad_arguments():
    values = jnp.zeros(8)
    with pytest.raises(ValueError, match="mapping is 'spiral'.*ordered, interleaved"):
        pack(values, 2, "spiral")
    with pytest.raises(ValueError, match="mapping is ''"):
        unpack(pack(values, 2), 8, "")
    for num_blocks in (0, 5):
        with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}.*num_symbols=4"):
            pack(values, num_blocks)
    with pytest.raises(ValueError, match="symbols has shape"):
        unpack(pack(values, 2), 10)
