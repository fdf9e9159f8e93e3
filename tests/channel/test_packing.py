"""Tests of the packing of reals into the symbols of the fading blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, block_mask, pack, radiated_energy, symbols_per_block, unpack
from tests.checks import within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES = [
    *((16, 4), (23, 4), (1, 1)),
    *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((16, 8), (22, 4), (7, 3), (2, 1), (127, 10))),
]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("num_values", "num_blocks"), SIZES)
def test_round_trip(num_values, num_blocks, mapping):
    values = np.random.default_rng(0).standard_normal(num_values, np.float32)
    num_symbols = (num_values + 1) // 2
    mask = block_mask(num_symbols, num_blocks)

    @jax.jit
    def there_and_back(values):
        symbols = pack(values, num_blocks, mapping)
        # Noise in the empty slots must not reach the values.
        return symbols, unpack(jnp.where(mask, symbols, 9.0), num_values, mapping)

    symbols, back = there_and_back(values)
    assert symbols.shape == mask.shape and symbols.dtype == jnp.complex64
    assert mask.sum() == num_symbols
    np.testing.assert_array_equal(np.asarray(symbols)[~mask], 0)
    np.testing.assert_allclose(back, values, rtol=1e-6)
    np.testing.assert_allclose(np.sum(np.abs(symbols) ** 2), np.sum(np.asarray(values) ** 2) / 2, rtol=1e-5)


def test_where_each_symbol_goes():
    values = np.sqrt(2) * jnp.arange(10.0)  # symbols (0 1), (2 3), (4 5), (6 7), (8 9) of which the real part is shown
    ordered, interleaved = (np.asarray(pack(values, 3, mapping).real) for mapping in MAPPINGS)
    np.testing.assert_allclose(ordered, [[0, 2], [4, 6], [8, 0]], rtol=1e-6)
    np.testing.assert_allclose(interleaved, [[0, 6], [2, 8], [4, 0]], rtol=1e-6)
    np.testing.assert_array_equal(symbols_per_block(5, 3), [2, 2, 1])
    np.testing.assert_array_equal(block_mask(5, 3), [[1, 1], [1, 1], [1, 0]])


def test_unit_variance_values_give_unit_power_symbols():
    values = np.random.default_rng(1).standard_normal(2**15, np.float32)
    symbols = jax.jit(lambda values: pack(values, 4))(values)
    within_standard_error(np.abs(np.asarray(symbols)) ** 2, 1.0)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_vmap_agrees_with_the_loop_and_gradients_pass(mapping):
    @jax.jit
    def compute(batch):
        mapped = jax.vmap(lambda values: pack(values, 3, mapping))(batch)
        loop = jnp.stack([pack(values, 3, mapping) for values in batch])
        back = jax.vmap(lambda symbols: unpack(symbols, 13, mapping))(mapped)
        energy = jax.grad(lambda x: jnp.sum(unpack(pack(x, 3, mapping), 13, mapping) ** 2))(batch[0])
        return mapped, loop, back, energy

    batch = np.random.default_rng(2).standard_normal((3, 13), np.float32)
    mapped, loop, back, gradient = compute(batch)
    np.testing.assert_allclose(mapped, loop, rtol=1e-6)
    np.testing.assert_allclose(back, batch, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * batch[0], rtol=1e-5)


@pytest.mark.parametrize(("num_symbols", "num_blocks"), [(32, 4), (33, 4), (35, 8)])
def test_energy_budget(num_symbols, num_blocks):
    energy = jax.jit(lambda power: radiated_energy(power, num_symbols, num_blocks))
    np.testing.assert_allclose(energy(np.full(num_blocks, 0.7, np.float32)), 0.7 * num_symbols, rtol=1e-6)
    power = np.random.default_rng(4).exponential(size=num_blocks).astype(np.float32)
    symbols = np.sqrt(power)[:, None] * block_mask(num_symbols, num_blocks)
    np.testing.assert_allclose(energy(power), np.sum(symbols**2), rtol=1e-5)


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
