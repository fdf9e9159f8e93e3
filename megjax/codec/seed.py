"""SeedCodec: the learned codec as its users meet it, with jitted methods and files."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from megjax.channel import MAPPINGS
from megjax.codec import link
from megjax.codec.coders import LearnedCoder
from megjax.codec.importance import block_weights
from megjax.codec.network import SeedCodecConfig, SeedNetwork
from megjax.configs import from_mapping, read_json, require, require_count, require_type, write_json
from megjax.files import read_safetensors, write_safetensors
from megjax.keys import from_seed
from megjax.units import check_snr_db

ASSETS = Path(__file__).parent.parent / "assets"
CONFIG_NAME, WEIGHTS_NAME, VALIDATION_NAME = "config.json", "model.safetensors", "validation.safetensors"
BUNDLED = ("scenes",)
TYPES = ("float32", "bfloat16", "float16")


class SeedCodec:
    """A trained codec: latents to the symbols of a seed and back, at any rate and SNR.

    `graph` and `state` feed the pure functions below; `config` is static; `validation` are some latents [m h w c] that
    were not trained on, or None. The methods hold one compiled program for each set of shapes and static arguments.
    """

    def __init__(self, network: SeedNetwork, validation: Float[np.ndarray, "m h w c"] | None = None):
        self.config, self.validation = network.config, validation
        self.graph, self.state = nnx.split(network)
        static = ("num_symbols", "num_blocks", "mapping")
        self._encode = jax.jit(functools.partial(encode, self.graph), static_argnames=static)
        self._decode = jax.jit(functools.partial(decode, self.graph), static_argnames=("num_symbols", "mapping"))
        self._weights = jax.jit(self._measure_weights, static_argnames=static)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dtype=jnp.float32) -> "SeedCodec":
        """Load "scenes" (bundled) or a folder that `save_pretrained` wrote; `dtype` is that of the activations.

        Raises ValueError when there is no such folder, or its weights are damaged or do not fit its configuration.
        """
        dtype = getattr(jnp, require_type("dtype", dtype, TYPES).name)
        bundled = name_or_folder in BUNDLED and not Path(name_or_folder).is_dir()
        folder = ASSETS / str(name_or_folder) / "codec" if bundled else Path(name_or_folder)
        require(folder.is_dir(), "codec", str(name_or_folder), f"one of {BUNDLED} or an existing folder")
        config = from_mapping(SeedCodecConfig, read_json(folder / CONFIG_NAME), source=str(folder / CONFIG_NAME))
        network = nnx.eval_shape(lambda: SeedNetwork(dataclasses.replace(config, dtype=dtype), nnx.Rngs(0)))
        graph, shapes = nnx.split(network)
        state = _read_state(folder / WEIGHTS_NAME, shapes)
        path = folder / VALIDATION_NAME
        validation = read_safetensors(path)["latents"].astype(np.float32) if path.is_file() else None
        if validation is not None:
            found = validation.shape[1:]
            require(found == config.latent_shape, f"{path}: latents' shape", found, str(config.latent_shape))
        return cls(nnx.merge(graph, state), validation)

    def save_pretrained(self, folder: str | Path, dtype=np.float16) -> None:
        """Write configuration and weights to `folder`, parameters as `dtype` and statistics as float32."""
        folder, dtype = Path(folder), require_type("dtype", dtype, TYPES)
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.asdict(self.config)
        write_json(folder / CONFIG_NAME, {k: v for k, v in config.items() if k != "dtype"})
        tensors = {}
        for path, variable in nnx.to_flat_state(self.state):
            kind = dtype if isinstance(variable, nnx.Param) else np.float32
            tensors[".".join(map(str, path))] = np.ascontiguousarray(np.asarray(variable[...]).astype(kind))
        write_safetensors(folder / WEIGHTS_NAME, tensors)
        if self.validation is not None:
            write_safetensors(folder / VALIDATION_NAME, {"latents": self.validation.astype(dtype)})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h w c] of the latents."""
        return self.config.latent_shape

    def num_symbols(self, rate: int | float) -> int:
        """Complex channel uses at compression ratio `rate`, K = hwc / (2 r)."""
        return link.symbols_at_rate(rate, self.config.num_values)

    def encode(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        num_symbols: int,
        snr_db: float,
        num_blocks: int = 16,
        mapping: str = "ordered",
    ) -> tuple[Complex[Array, "b t k"], Float[Array, " t"]]:
        """Symbols [b t k], every block of unit mean power over the data, and the power the codec wants for each block.

        `snr_db` is the effective P / sigma^2; the `load` [t] of mean 1 depends on it, on K and on the mapping only.
        Raises ValueError for latents of another shape, too few or too many symbols, or an unknown mapping.
        """
        self._check(num_symbols, snr_db, num_blocks, mapping)
        expected = self.config.latent_shape
        require(np.shape(latents)[1:] == expected, "latents' shape", np.shape(latents), f"[b, *{expected}]")
        return self._encode(
            self.state, latents, jnp.float32(snr_db), num_symbols=num_symbols, num_blocks=num_blocks, mapping=mapping
        )

    def decode(
        self,
        symbols: Complex[Array | np.ndarray, "b t k"],
        block_snr: Float[Array | np.ndarray, "b t"],
        num_symbols: int,
        snr_db: float,
        mapping: str = "ordered",
    ) -> Float[Array, "b h w c"]:
        """Latents from LMMSE-equalised symbols and the linear post-equalisation SNR of their blocks.

        `num_symbols`, `snr_db` and `mapping` are those of `encode`: the SNR selects the code, `block_snr` says how it
        arrived. Errors as in `encode`.
        """
        require(np.ndim(symbols) == 3, "symbols' shape", np.shape(symbols), "[b t k], as encode gives")
        num_blocks = symbols.shape[1]
        self._check(num_symbols, snr_db, num_blocks, mapping)
        longest = -(-num_symbols // num_blocks)
        expected = (len(symbols), num_blocks, longest)
        require(symbols.shape == expected, "symbols' shape", symbols.shape, f"{expected} for {num_symbols} symbols")
        require(np.shape(block_snr) == expected[:2], "block_snr's shape", np.shape(block_snr), str(expected[:2]))
        return self._decode(
            self.state, symbols, block_snr, jnp.float32(snr_db), num_symbols=num_symbols, mapping=mapping
        )

    def block_weights(
        self,
        num_symbols: int,
        snr_db: float,
        num_blocks: int = 16,
        mapping: str = "ordered",
        latents: Float[Array | np.ndarray, "m h w c"] | None = None,
    ) -> Float[Array, " t"]:
        """Importance w_t of the blocks at this rate and effective SNR, mean 1, measured on `validation` or `latents`.

        The growth of the latent's MSE when block t alone is erased; see `schemes.block_weights`. Errors as in `encode`,
        and ValueError without latents to measure on.
        """
        self._check(num_symbols, snr_db, num_blocks, mapping)
        chosen = self.validation if latents is None else latents
        require(chosen is not None, "latents", latents, "given, as this codec came without validation latents")
        expected = self.config.latent_shape
        require(np.shape(chosen)[1:] == expected, "latents' shape", np.shape(chosen), f"[m, *{expected}]")
        return self._weights(
            self.state, chosen, jnp.float32(snr_db), num_symbols=num_symbols, num_blocks=num_blocks, mapping=mapping
        )

    def _measure_weights(self, state, latents, snr_db, *, num_symbols: int, num_blocks: int, mapping: str):
        scheme, key = LearnedCoder(self.graph, state), from_seed(0)
        return block_weights(scheme, key, latents, num_symbols, snr_db, num_blocks, mapping)

    def _check(self, num_symbols: int, snr_db: float, num_blocks: int, mapping: str) -> None:
        require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
        require_count("num_blocks", num_blocks)
        link.check_symbols(num_symbols, self.config.num_values, num_blocks)
        require(check_snr_db(snr_db).ndim == 0, "snr_db", snr_db, "one number in dB")


def encode(graph, state, latents, snr_db, *, num_symbols: int, num_blocks: int, mapping: str):
    """`SeedCodec.encode` as a function of the codec's state."""
    network: SeedNetwork = nnx.merge(graph, state)
    values = network.encode(latents, snr_db, num_symbols)
    spent = link.spending(network.spend(snr_db, num_symbols), num_symbols, num_blocks, mapping)
    symbols = jax.vmap(lambda v: link.pack_code(v, spent, num_symbols, num_blocks, mapping))(values)
    return symbols, spent.load


def decode(graph, state, symbols, block_snr, snr_db, *, num_symbols: int, mapping: str):
    """`SeedCodec.decode` as a function of the codec's state."""
    network: SeedNetwork = nnx.merge(graph, state)
    spent = link.spending(network.spend(snr_db, num_symbols), num_symbols, symbols.shape[1], mapping)
    received = jax.vmap(lambda s, snr: link.unpack_code(s, snr, spent, num_symbols, mapping))(symbols, block_snr)
    levels = jnp.full(len(symbols), snr_db, jnp.float32), jnp.full(len(symbols), num_symbols)
    return network.decode(received.estimate, received.snr, *levels)


def _read_state(path: Path, shapes: nnx.State) -> nnx.State:
    """Weights of a file as float32, strictly: ValueError lists the tensors that are missing, foreign or misshapen."""
    places = {".".join(map(str, keys)): (keys, variable) for keys, variable in nnx.to_flat_state(shapes)}
    found = read_safetensors(path, {name: variable for name, (_, variable) in places.items()})
    return nnx.from_flat_state(
        [(keys, variable.replace(jnp.asarray(found[name], jnp.float32))) for name, (keys, variable) in places.items()]
    )
