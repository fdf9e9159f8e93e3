"""Packing of a real vector into the complex symbols of the fading blocks, two reals a symbol, and back.

K symbols fill T blocks: the first K mod T blocks carry one symbol more than the others, whose last slot is then empty
(zero, and False in `block_mask`). An odd number of reals is padded with one zero, so K = ceil(n / 2).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

MAPPINGS = ("ordered", "interleaved")


def symbols_per_block(num_symbols: int, num_blocks: int) -> Int[np.ndarray, " t"]:
    """Number of symbols in each block [t], a static NumPy array that sums to `num_symbols`."""
    if not 1 <= num_blocks <= num_symbols:
        raise ValueError(f"num_blocks is {num_blocks}; it must be between 1 and num_symbols={num_symbols}")
    return num_symbols // num_blocks + (np.arange(num_blocks) < num_symbols % num_blocks)


def block_mask(num_symbols: int, num_blocks: int) -> Bool[np.ndarray, "t k"]:
    """Which slots of the packed array [t k], k = ceil(K / T), carry a symbol; a static NumPy array."""
    counts = symbols_per_block(num_symbols, num_blocks)
    return np.arange(counts[0]) < counts[:, np.newaxis]


def pack(values: Float[Array, " n"], num_blocks: int, mapping: str = "ordered") -> Complex[Array, "t k"]:
    """Symbols complex64 [t k] carrying `values` [n]: symbol i is (values[2i] + 1j values[2i+1]) / sqrt(2).

    Values of unit variance give symbols of unit power. "ordered" puts the first symbols into the first block;
    "interleaved" deals them out to the blocks in turn. Raises ValueError for any other mapping, or for more blocks than
    symbols.
    """
    _check_mapping(mapping)
    pairs = jnp.pad(values, (0, values.shape[0] % 2)).reshape(-1, 2) / np.float32(np.sqrt(2))
    symbols = jax.lax.complex(pairs[:, 0], pairs[:, 1])
    counts = symbols_per_block(symbols.shape[0], num_blocks)
    longest, empty = int(counts[0]), int(counts[0] * num_blocks - symbols.shape[0])
    if mapping == "interleaved":
        return jnp.pad(symbols, (0, empty)).reshape(longest, num_blocks).T
    full = (num_blocks - empty) * longest
    short = symbols[full:].reshape(empty, longest - 1)
    return jnp.concatenate([symbols[:full].reshape(-1, longest), jnp.pad(short, ((0, 0), (0, 1)))])


def unpack(symbols: Complex[Array, "t k"], num_values: int, mapping: str = "ordered") -> Float[Array, " n"]:
    """The real vector [num_values] that `pack` put into `symbols`; what empty slots hold is ignored."""
    _check_mapping(mapping)
    num_blocks, longest = symbols.shape
    num_symbols = (num_values + 1) // 2
    counts = symbols_per_block(num_symbols, num_blocks)
    if counts[0] != longest:
        raise ValueError(f"symbols has shape {symbols.shape}; {num_values} values need [{num_blocks} {counts[0]}]")
    if mapping == "interleaved":
        flat = symbols.T.reshape(-1)[:num_symbols]
    else:
        full = num_blocks - int(counts[0] * num_blocks - num_symbols)
        flat = jnp.concatenate([symbols[:full].reshape(-1), symbols[full:, : longest - 1].reshape(-1)])
    pairs = jnp.stack([flat.real, flat.imag], axis=-1) * np.float32(np.sqrt(2))
    return pairs.reshape(-1)[:num_values]


def radiated_energy(power: Float[Array, " t"], num_symbols: int, num_blocks: int) -> Float[Array, ""]:
    """Energy of one image: the sum over blocks of (symbols in block t) times p_t, for symbols of unit power."""
    return jnp.sum(power * symbols_per_block(num_symbols, num_blocks).astype(np.float32))


def _check_mapping(mapping: str) -> None:
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping is {mapping!r}; it must be one of {', '.join(MAPPINGS)}")


def to_blocks(symbols: Complex[Array, " k"], num_blocks: int) -> Complex[Array, "t n"]:
    """Symbols dealt out to the blocks in turn, as `pack` does with the values of an interleaved mapping."""
    values = np.float32(np.sqrt(2)) * jnp.stack([symbols.real, symbols.imag], -1).reshape(-1)
    return pack(values, num_blocks, "interleaved")


def from_blocks(symbols: Complex[Array, "t n"], num_symbols: int) -> Complex[Array, " k"]:
    """The inverse of `to_blocks`."""
    values = unpack(symbols, 2 * num_symbols, "interleaved").reshape(-1, 2) / np.float32(np.sqrt(2))
    return jax.lax.complex(values[:, 0], values[:, 1])
