"""Analog schemes behind one protocol, the learned codec and its linear rivals, and what erasing a block costs them.

SNRs are effective, P / sigma^2 in dB: the link is simulated at P = 1, which is the same physics. Latents come in
batches; K is static.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from megjax.channel import MAPPINGS, Fading, post_equalisation_snr
from megjax.channel.loading import MeanError
from megjax.channel.numerics import squared_magnitude
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import linear, link
from megjax.codec.linear import LatentStatistics
from megjax.codec.network import SeedNetwork
from megjax.configs import require
from megjax.keys import threefry
from megjax.pytrees import pytree_dataclass, static
from megjax.units import db_to_linear

POWERS = ("codec", "equal")
"""Power of the blocks: p_t = P times the load that the scheme wants, or p_t = P."""


@runtime_checkable
class Scheme(Protocol):
    """What an analog scheme is: a pytree, so that it can be an argument of a jitted function."""

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """Load of the blocks and shape [n] inside them, which depend on these arguments only."""

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """Values of zero mean and unit variance over the data, of which the first 2K are sent."""

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """Latents from what the receivers have, `estimate` [b n] and `snr` [b n]."""


@pytree_dataclass
class LearnedScheme:
    """The learned codec, as `LearnedScheme(codec.graph, codec.state)` of a `SeedCodec`.

    With transform "raw" it is the raw latent with a learned receiver.
    """

    graph: nnx.GraphDef = static()
    state: nnx.State

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """As in `Scheme`: the codec's own."""
        return _spending(self._network().spend(snr_db, num_symbols), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Scheme`."""
        return self._network().encode(latents, snr_db, num_symbols)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """As in `Scheme`."""
        size = len(received.estimate)
        levels = jnp.full(size, snr_db, jnp.float32), jnp.full(size, num_symbols)
        return self._network().decode(received.estimate, received.snr, *levels)

    def _network(self) -> SeedNetwork:
        return nnx.merge(self.graph, self.state)


@pytree_dataclass
class KLTScheme:
    """The KLT with the loads of every value that are best for a fading law, given by its `mean_error`."""

    statistics: LatentStatistics
    latent_shape: tuple[int, int, int] = static()
    mean_error: MeanError = static(default=mean_lmmse_error_rayleigh)

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """As in `Scheme`: `klt_load` of the first 2K values."""
        size = self.statistics.mean.shape[0]
        link.check_symbols(num_symbols, size, num_blocks)
        load = linear.klt_load(self.statistics, 2 * num_symbols, db_to_linear(snr_db), self.mean_error)
        return _spending(jnp.pad(load, (0, size - 2 * num_symbols)), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Scheme`; the values depend on neither SNR nor K."""
        del snr_db, num_symbols
        return jax.vmap(linear.klt_encode, (None, 0))(self.statistics, latents)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """As in `Scheme`: the linear optimum."""
        del snr_db, num_symbols
        return jax.vmap(lambda r: linear.klt_decode(self.statistics, *r, self.latent_shape))(received)


@pytree_dataclass
class RawScheme:
    """The raw latent in its natural order at equal power, standardised per channel.

    With `statistics` the receiver is the full-covariance Wiener filter, without them it takes symbol by symbol.
    """

    mean: Float[Array, " c"]
    std: Float[Array, " c"]
    latent_shape: tuple[int, int, int] = static()
    statistics: LatentStatistics | None = None

    @classmethod
    def of(cls, latents: Float[ArrayLike, "n h w c"], statistics: LatentStatistics | None = None) -> "RawScheme":
        """The scheme with the channels' means and standard deviations over these latents."""
        latents = jnp.asarray(latents, jnp.float32)
        return cls(latents.mean((0, 1, 2)), latents.std((0, 1, 2)), latents.shape[1:], statistics)

    def spending(self, snr_db: Float[ArrayLike, ""], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
        """As in `Scheme`: the same power for all values."""
        del snr_db
        height, width, channels = self.latent_shape
        return _spending(jnp.ones(height * width * channels, jnp.float32), num_symbols, num_blocks, mapping)

    def encode(
        self, latents: Float[Array, "b h w c"], snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b n"]:
        """As in `Scheme`; the values depend on neither SNR nor K."""
        del snr_db, num_symbols
        return jax.vmap(lambda z: linear.raw_encode(self.mean, self.std, z))(latents)

    def decode(
        self, received: link.Received, snr_db: Float[ArrayLike, ""], num_symbols: int
    ) -> Float[Array, "b h w c"]:
        """As in `Scheme`."""
        del snr_db, num_symbols
        if self.statistics is None:
            return jax.vmap(lambda r: linear.raw_decode(self.mean, self.std, *r, self.latent_shape))(received)
        return jax.vmap(lambda r: linear.wiener_decode(self.statistics, self.mean, self.std, *r, self.latent_shape))(
            received
        )


def realisation_keys(key: Key[Array, ""], images: ArrayLike, realisation: ArrayLike = 0) -> Key[Array, " b"]:
    """Keys of one realisation, or of one each [b], for the images of these numbers [b]; they depend on nothing else."""
    images, key = jnp.asarray(images), threefry(key)
    one = lambda i, r: jax.random.fold_in(jax.random.fold_in(key, i), r)  # noqa: E731
    return jax.vmap(one)(images, jnp.broadcast_to(jnp.asarray(realisation), images.shape))


def draw_gains(keys: Key[Array, " b"], fading: Fading, num_blocks: int) -> Array:
    """The complex gains [b t] that `simulate` draws from these keys."""
    return jax.vmap(lambda key: fading.sample(jax.random.split(key)[0], num_blocks))(threefry(keys))


def block_power(spending: link.Spending, power: str | Float[Array, " t"]) -> Float[Array, " t"]:
    """p_t / P of the blocks [t] by a rule of `POWERS`, or as given; ValueError for another rule or shape."""
    if isinstance(power, str):
        require(power in POWERS, "power", power, f"one of {POWERS}, or an array")
        return spending.load if power == "codec" else jnp.ones_like(spending.load)
    require(power.shape == spending.load.shape, "power's shape", power.shape, str(spending.load.shape))
    return power


def simulate(
    scheme: Scheme,
    keys: Key[Array, " b"],
    latents: Float[Array, "b h w c"],
    snr_db: Float[ArrayLike, ""],
    fading: Fading,
    *,
    num_symbols: int,
    num_blocks: int = 16,
    mapping: str = "ordered",
    power: str | Float[Array, " t"] = "codec",
    spending: link.Spending | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b t"]]:
    """Received latents and linear post-equalisation SNRs of the blocks, one realisation of the link for each latent.

    A key's first half gives the gains, which depend on it and `num_blocks` only: schemes that are given the same keys
    see the same gains. `snr_db` is the effective P / sigma^2; `power` is one of `POWERS`, or what a policy gives the
    blocks in units of P; `spending`, if given, spares the scheme working it out. Raises ValueError for an unknown
    mapping or power, or a K that does not fit.
    """
    if spending is None:
        spending = scheme.spending(snr_db, num_symbols, num_blocks, mapping)
    shares, noise_var = block_power(spending, power), db_to_linear(-jnp.asarray(snr_db, jnp.float32))

    def send(key, values):
        gain_key, noise_key = jax.random.split(key)
        gains = fading.sample(gain_key, num_blocks)
        received = link.send_code(noise_key, values, spending, gains, shares, noise_var, num_symbols, mapping)
        return received, post_equalisation_snr(gains, shares, noise_var)

    received, block_snr = jax.vmap(send)(threefry(keys), scheme.encode(latents, snr_db, num_symbols))
    return scheme.decode(received, snr_db, num_symbols), block_snr


def block_weights(
    scheme: Scheme,
    key: Key[Array, ""],
    latents: Float[Array, "b h w c"],
    num_symbols: int,
    snr_db: Float[ArrayLike, ""],
    num_blocks: int = 16,
    mapping: str = "ordered",
) -> Float[Array, " t"]:
    """Importance of the blocks, mean 1: how much the latents' MSE grows when block t alone is erased.

    The others are then at their mean SNR, that of their load at |h|^2 = 1. All blocks are compared with the same
    noise, so a few hundred latents do; a growth that comes out negative counts as 0, and blocks that all matter
    nothing get equal weights. Raises ValueError for an unknown mapping or a K that does not fit.
    """
    mean_snr = db_to_linear(snr_db) * scheme.spending(snr_db, num_symbols, num_blocks, mapping).load
    error = _latent_error(scheme, latents, num_symbols, snr_db, num_blocks, mapping)
    present = 1 - jnp.eye(num_blocks + 1, num_blocks, dtype=jnp.float32)
    errors = jax.lax.map(lambda row: error(jax.random.clone(key), row * mean_snr), present)
    growth = jnp.maximum(errors[:-1] - errors[-1], 0.0)
    mean = growth.mean()
    return jnp.where(mean > 0, growth / jnp.where(mean > 0, mean, 1.0), 1.0)


class AdditiveCheck(NamedTuple):
    """How well sum_t w_t / (1 + gamma_t) stands for the latents' MSE, over r realisations of the gains."""

    measured: Float[Array, " r"]
    """MSE per latent, averaged over the latents."""
    predicted: Float[Array, " r"]
    """Scale and offset, by least squares, applied to the sum."""
    r_squared: Float[Array, ""]
    """Share of the MSE's variance that is predicted; the squared correlation of sum and MSE."""


def additive_prediction(
    scheme: Scheme,
    key: Key[Array, ""],
    latents: Float[Array, "b h w c"],
    weights: Float[Array, " t"],
    snr_db: Float[ArrayLike, ""],
    fading: Fading,
    *,
    num_symbols: int,
    mapping: str = "ordered",
    power: str | Float[Array, " t"] = "codec",
    num_realisations: int = 200,
) -> AdditiveCheck:
    """Compare the additive model of the error with simulation, all latents being sent over each drawn realisation.

    Only a scale and an offset are fitted, neither of which changes a power policy. A law without fading leaves nothing
    to predict and gives NaN. Raises ValueError for an unknown mapping or power, or a K that does not fit.
    """
    num_blocks = weights.shape[0]
    spending = scheme.spending(snr_db, num_symbols, num_blocks, mapping)
    shares = db_to_linear(snr_db) * block_power(spending, power)
    keys = jax.random.split(threefry(key), (2, num_realisations))
    gains = jax.vmap(lambda k: fading.sample(k, num_blocks))(keys[0])
    block_snr = squared_magnitude(gains) * shares[None]
    error = _latent_error(scheme, latents, num_symbols, snr_db, num_blocks, mapping)
    measured = jax.lax.map(lambda pair: error(*pair), (keys[1], block_snr))
    total = jnp.sum(weights[None] / (1 + block_snr), axis=1)
    centred, deviation = total - total.mean(), measured - measured.mean()
    scale = jnp.mean(centred * deviation) / jnp.mean(jnp.square(centred))
    predicted = measured.mean() + scale * centred
    share = jnp.mean(jnp.square(scale * centred)) / jnp.mean(jnp.square(deviation))
    return AdditiveCheck(measured, predicted, share)


def _latent_error(scheme, latents, num_symbols: int, snr_db, num_blocks: int, mapping: str):
    """`(key, block_snr [t]) -> MSE` per latent when all of them are received at these SNRs."""
    spending = scheme.spending(snr_db, num_symbols, num_blocks, mapping)
    values = scheme.encode(latents, snr_db, num_symbols)
    block = link.block_of_value(values.shape[1], num_symbols, num_blocks, mapping == "interleaved")

    def error(key, block_snr):
        snr = link.value_snr(spending, block_snr, block)
        keys = jax.random.split(threefry(key), len(values))
        received = jax.vmap(link.receive_values, (0, 0, None))(keys, values, snr)
        return jnp.square(scheme.decode(received, snr_db, num_symbols) - latents).sum((1, 2, 3)).mean()

    return error


def _spending(spend: Float[Array, " n"], num_symbols: int, num_blocks: int, mapping: str) -> link.Spending:
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    link.check_symbols(num_symbols, spend.shape[0], num_blocks)
    return link.spending(spend, num_symbols, num_blocks, mapping)
