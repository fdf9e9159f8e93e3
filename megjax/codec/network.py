"""The networks of the seed codec: whitened latent to values of unit variance, received values to latent."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int

from megjax.configs import require, require_positive_integers
from megjax.precision import EXACT, LayerNorm, exact_matmul

LOG_SNR_SCALE = 7.0
EPSILON = 1e-6


class Constant(nnx.Variable):
    """What is stored with a model but not trained: statistics of the latents and of the code."""


@dataclasses.dataclass(frozen=True)
class SeedCodecConfig:
    """Static description of a seed codec.

    A latent [h w c] is cut into tiles of `tile` [h w], which share one whitening and one network and exchange
    information in every block; a small latent is one tile. `width` is that of the residual stream, `hidden` that of a
    block's perceptron. `transform` "klt" codes the whitened coefficients, "raw" sends the latent's numbers as they are
    (a learned receiver only, with `encoder_blocks` 0). Encoder and standardisation know SNR and rate by the nearest
    point of a grid: `snr_steps` of effective P / sigma^2 from `min_snr_db` to `max_snr_db` and `rate_steps` of log2 r
    from 0 to `max_log2_rate`.
    """

    latent_shape: tuple[int, int, int] = (8, 8, 4)
    tile: tuple[int, int] = (8, 8)
    width: int = 512
    hidden: int = 512
    encoder_blocks: int = 1
    decoder_blocks: int = 3
    transform: str = "klt"
    min_snr_db: float = -15.0
    max_snr_db: float = 35.0
    snr_steps: int = 21
    max_log2_rate: float = 3.0
    rate_steps: int = 7
    dtype: DTypeLike = dataclasses.field(default=jnp.float32, metadata={"saved": False})

    def __post_init__(self):
        positive = ("latent_shape", "tile", "width", "hidden", "decoder_blocks", "snr_steps", "rate_steps")
        require_positive_integers(self, "codec", positive)
        require(len(self.latent_shape) == 3, "codec: latent_shape", self.latent_shape, "[h w c]")
        fits = len(self.tile) == 2 and all(s % t == 0 for s, t in zip(self.latent_shape, self.tile, strict=False))
        require(fits, "codec: tile", self.tile, f"[h w] that divides the latent, {self.latent_shape}")
        require(self.transform in ("klt", "raw"), "codec: transform", self.transform, "'klt' or 'raw'")
        require(self.encoder_blocks >= 0, "codec: encoder_blocks", self.encoder_blocks, "at least 0")
        alone = self.transform == "klt" or self.encoder_blocks == 0
        require(alone, "codec: encoder_blocks", self.encoder_blocks, "0 with transform 'raw'")
        ordered = self.min_snr_db < self.max_snr_db and self.snr_steps >= 2
        require(ordered, "codec: SNR grid", (self.min_snr_db, self.max_snr_db, self.snr_steps), "increasing")
        require(self.max_log2_rate > 0 and self.rate_steps >= 2, "codec: rate_steps", self.rate_steps, "at least 2")

    @property
    def num_values(self) -> int:
        """Real numbers in a latent, n = h w c."""
        return math.prod(self.latent_shape)

    @property
    def num_tiles(self) -> int:
        return self.num_values // self.tile_values

    @property
    def tile_values(self) -> int:
        """Real numbers in a tile."""
        return self.tile[0] * self.tile[1] * self.latent_shape[2]

    @property
    def snr_grid_db(self) -> np.ndarray:
        return np.linspace(self.min_snr_db, self.max_snr_db, self.snr_steps)

    @property
    def rate_grid(self) -> np.ndarray:
        """Compression ratios r of the grid, 1 first."""
        return 2.0 ** np.linspace(0.0, self.max_log2_rate, self.rate_steps)


class Block(nnx.Module):
    """Residual perceptron of every tile, modulated by the condition; several tiles first mix across themselves.

    Adaptive layer normalisation with a gate that starts at zero (Peebles and Xie 2023, section 3.2), mixing across
    tiles as in Tolstikhin et al. (2021).
    """

    def __init__(self, config: SeedCodecConfig, condition: int, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.norm = LayerNorm(width, epsilon=EPSILON, use_scale=False, use_bias=False, dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(condition, 3 * width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, config.hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, width, dtype=dtype, rngs=rngs)
        if config.num_tiles > 1:
            self.mix = nnx.Linear(
                config.num_tiles, config.num_tiles, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
            )

    def __call__(self, x: Float[Array, "b s d"], condition: Float[Array, "b e"]) -> Float[Array, "b s d"]:
        scale, shift, gate = jnp.split(self.modulation(condition)[:, None], 3, axis=-1)
        if hasattr(self, "mix"):
            x = x + self.mix(self.norm(x).swapaxes(1, 2)).swapaxes(1, 2)
        y = (1 + scale) * self.norm(x) + shift
        return x + (1 + gate) * self.down(jax.nn.gelu(self.up(y)))


class Trunk(nnx.Module):
    """Residual blocks between a linear map in and one out, which starts at zero."""

    CONDITION = 64

    def __init__(self, config: SeedCodecConfig, inputs: int, blocks: int, rngs: nnx.Rngs):
        dtype, zeros = config.dtype, nnx.initializers.zeros
        self.condition_in = nnx.Linear(2, self.CONDITION, dtype=dtype, rngs=rngs)
        self.condition_out = nnx.Linear(self.CONDITION, self.CONDITION, dtype=dtype, rngs=rngs)
        self.inputs = nnx.Linear(inputs, config.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, self.CONDITION, rngs) for _ in range(blocks)])
        self.norm = LayerNorm(config.width, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(self.CONDITION, config.width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.outputs = nnx.Linear(config.width, config.tile_values, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b s i"], condition: Float[Array, "b 2"]) -> Float[Array, "b s n"]:
        condition = jax.nn.silu(self.condition_out(jnp.tanh(self.condition_in(condition))))
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.outputs((1 + self.gate(condition)[:, None]) * self.norm(x)).astype(jnp.float32)


class SeedNetwork(nnx.Module):
    """Encoder, decoder and power of the seed codec; batch first, full-length vectors of n values.

    At the start, with its networks' outputs at zero, it is the KLT scheme with the loads it is given.
    """

    def __init__(self, config: SeedCodecConfig, rngs: nnx.Rngs):
        n, grid = config.tile_values, (config.snr_steps, config.rate_steps)
        self.config = config
        self.latent_mean = Constant(jnp.zeros(n, jnp.float32))
        self.scale = Constant(jnp.ones(n, jnp.float32))
        self.basis = Constant(jnp.eye(n, dtype=jnp.float32)) if config.transform == "klt" else None
        self.code_mean = Constant(jnp.zeros((*grid, config.num_values), jnp.float32))
        self.code_std = Constant(jnp.ones((*grid, config.num_values), jnp.float32))
        self.encoder_scale = Constant(jnp.ones(grid, jnp.float32))
        self.load_logits = nnx.Param(jnp.zeros((*grid, n), jnp.float32))
        self.encoder = Trunk(config, n, config.encoder_blocks, rngs) if config.encoder_blocks else None
        self.decoder = Trunk(config, 2 * n, config.decoder_blocks, rngs)

    def tiles(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b s n"]:
        """Tiles of the latent, each as a vector."""
        (h, w, c), (th, tw) = self.config.latent_shape, self.config.tile
        x = latents.reshape(-1, h // th, th, w // tw, tw, c).swapaxes(2, 3)
        return x.reshape(-1, self.config.num_tiles, self.config.tile_values)

    def from_tiles(self, tiles: Float[Array, "b s n"]) -> Float[Array, "b h w c"]:
        """The latent of which these are the tiles."""
        (h, w, c), (th, tw) = self.config.latent_shape, self.config.tile
        return tiles.reshape(-1, h // th, w // tw, th, tw, c).swapaxes(2, 3).reshape(-1, h, w, c)

    def whiten(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b s n"]:
        """Uncorrelated coefficients of unit variance of every tile, largest variance first."""
        centred = self.tiles(latents) - self.latent_mean[None, None]
        return (centred if self.basis is None else exact_matmul(centred, self.basis[...])) / self.scale[None, None]

    def colour(self, coefficients: Float[Array, "b s n"]) -> Float[Array, "b h w c"]:
        """The latent with these coefficients; the inverse of `whiten`."""
        scaled = coefficients * self.scale[None, None]
        centred = scaled if self.basis is None else exact_matmul(scaled, self.basis[...].T)
        return self.from_tiles(self.latent_mean[None, None] + centred)

    def position(self, snr_db: Float[ArrayLike, "*g"], num_symbols: Int[ArrayLike, "*g"]) -> tuple[Array, Array]:
        """Real-valued place on the grid of SNRs and of rates, from 0 to the last index."""
        config = self.config
        step_db = (config.max_snr_db - config.min_snr_db) / (config.snr_steps - 1)
        log2_rate = jnp.log2(config.num_values / (2.0 * jnp.asarray(num_symbols, jnp.float32)))
        along_snr = (jnp.asarray(snr_db, jnp.float32) - config.min_snr_db) / step_db
        along_rate = log2_rate * ((config.rate_steps - 1) / config.max_log2_rate)
        return jnp.clip(along_snr, 0, config.snr_steps - 1), jnp.clip(along_rate, 0, config.rate_steps - 1)

    def mode(self, snr_db: ArrayLike, num_symbols: ArrayLike) -> tuple[Array, Array]:
        """Indices of the nearest grid point, which is all that the encoder knows of SNR and rate."""
        return tuple(jnp.round(x).astype(jnp.int32) for x in self.position(snr_db, num_symbols))

    def spend(self, snr_db: Float[ArrayLike, ""], num_symbols: Int[ArrayLike, ""]) -> Float[Array, " n"]:
        """Power that the codec wants for each value, up to a factor; the logarithms are interpolated over the grid."""
        row, column = self.position(snr_db, num_symbols)
        weights = tuple(
            jax.nn.relu(1 - jnp.abs(x - jnp.arange(size, dtype=jnp.float32)))
            for x, size in zip((row, column), self.load_logits.shape[:2], strict=True)
        )
        logits = jnp.einsum("s,r,srn->n", *weights, self.load_logits[...], precision=EXACT)
        return jnp.repeat(jnp.exp(logits), self.config.num_tiles)

    def analyse(
        self, latents: Float[Array, "b h w c"], row: Int[Array, " b"], column: Int[Array, " b"]
    ) -> Float[Array, "b n"]:
        """Values at these grid points before they are standardised: the coefficient's place first, then the tile."""
        x = self.whiten(latents)
        if self.encoder is not None:
            # As large as the error that linear coding leaves here: where the KLT does well, there is little to add.
            scale = self.encoder_scale[row, column][:, None, None]
            x = x + scale * self.encoder(x, self._features(row, column))
        return x.swapaxes(1, 2).reshape(x.shape[0], -1)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: Int[ArrayLike, ""]
    ) -> Float[Array, "b n"]:
        """Values of zero mean and unit variance over the data, most important first."""
        row, column = self.mode(snr_db, num_symbols)
        rows, columns = (jnp.broadcast_to(x, latents.shape[:1]) for x in (row, column))
        mean, std = self.moments(snr_db, num_symbols)
        return (self.analyse(latents, rows, columns) - mean[None]) / std[None]

    def moments(self, snr_db: Float[ArrayLike, "*g"], num_symbols: Int[ArrayLike, "*g"]) -> tuple[Array, Array]:
        """Mean and standard deviation [*g n] of the values over the data, as `analyse` gives them."""
        row, column = self.mode(snr_db, num_symbols)
        return self.code_mean[row, column], self.code_std[row, column]

    def decode(
        self,
        estimate: Float[Array, "b n"],
        snr: Float[Array, "b n"],
        snr_db: Float[Array, " b"],
        num_symbols: Int[Array, " b"],
        moments: tuple[Float[Array, "b n"], Float[Array, "b n"]] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Latents from LMMSE estimates of the values and the SNR of each; values that were not sent have SNR 0.

        `moments` are the means and standard deviations that the values were standardised by, if not `self.moments`.
        """
        config = self.config
        mean, std = self.moments(snr_db, num_symbols) if moments is None else moments
        sent = jnp.arange(config.num_values)[None] < 2 * num_symbols[:, None]
        estimate = jnp.where(sent, mean + std * estimate, 0.0)
        estimate, level = (
            x.reshape(-1, config.tile_values, config.num_tiles).swapaxes(1, 2)
            for x in (estimate, jnp.log1p(snr) / LOG_SNR_SCALE)
        )
        features = self._features(*self.position(snr_db, num_symbols))
        correction = self.decoder(jnp.concatenate([estimate, level], -1), features)
        # In units of the standard deviation that linear reception leaves, so that it vanishes at high SNR.
        return self.colour(estimate + jnp.exp(-0.5 * LOG_SNR_SCALE * level) * correction)

    def _features(self, row: Array, column: Array) -> Float[Array, "b 2"]:
        sizes = self.config.snr_steps - 1, self.config.rate_steps - 1
        places = (x.astype(jnp.float32) for x in (row, column))
        return jnp.stack([4.0 * x / size - 2.0 for x, size in zip(places, sizes, strict=True)], axis=-1)
