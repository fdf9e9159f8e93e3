"""Training of the seed codec through random links: draws of conditions, loss, start from the KLT, calibration."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from megjax.channel import JakesFading, NoFading, RayleighFading, RicianFading
from megjax.channel.loading import mean_lmmse_error_awgn, static_load
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import link
from megjax.codec.linear import LatentStatistics, klt_nmse, latent_statistics
from megjax.codec.network import SeedCodecConfig, SeedNetwork
from megjax.configs import require
from megjax.keys import threefry
from megjax.numerics import squared_magnitude
from megjax.units import db_to_linear, linear_to_db

SMALLEST_LOAD = 1e-4
DecodeImages = Callable[[Float[Array, "b h w c"]], Float[Array, "b H W 3"]]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What one step of training draws, for `groups` groups of `group_size` latents.

    A group shares SNR (uniform from `min_snr_db` to `max_snr_db`), power (1, or with `equal_energy` 1 or r), rate
    (one of `rates`, or log-uniform between the extremes), and mapping. Each latent has its own fading: Rayleigh,
    Rician, Jakes or none. Block powers are the codec's load, equal, or either times random factors.
    `num_symbols` and `snr_db` (effective, P / sigma^2) fix rate and SNR instead, for a specialist.
    """

    groups: int = 4
    group_size: int = 128
    num_blocks: int = 16
    min_snr_db: float = -15.0
    max_snr_db: float = 25.0
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    equal_energy: bool = True
    image_weight: float = 0.0
    first_share: float = 1.0
    snr_db: float | None = None
    num_symbols: int | None = None

    def __post_init__(self):
        for name in ("groups", "group_size", "num_blocks"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.group_size >= 8, "group_size", self.group_size, "at least 8, for the code's variance")
        require(self.min_snr_db <= self.max_snr_db, "max_snr_db", self.max_snr_db, f"at least {self.min_snr_db}")
        require(len(self.rates) > 0 and min(self.rates) >= 1, "rates", self.rates, "numbers of at least 1")
        require(0 <= self.image_weight <= 1, "image_weight", self.image_weight, "in [0, 1]")
        require(0 <= self.first_share <= 1, "first_share", self.first_share, "in [0, 1]")


class Draw(NamedTuple):
    """Conditions of the groups: effective SNR [g] in dB, symbols [g], mapping [g]."""

    snr_db: Float[Array, " g"]
    num_symbols: Int[Array, " g"]
    interleaved: Array


def draw_conditions(key: Key[Array, ""], conditions: Conditions, num_values: int) -> Draw:
    """Random SNR, power, rate and mapping of every group."""
    groups = (conditions.groups,)
    keys = jax.random.split(threefry(key), 5)
    rates = jnp.asarray(conditions.rates, jnp.float32)
    exact = rates[jax.random.randint(keys[0], groups, 0, len(conditions.rates), jnp.int32)]
    log_low, log_high = np.log2(min(conditions.rates)), np.log2(max(conditions.rates))
    between = 2 ** jax.random.uniform(keys[1], groups, jnp.float32, log_low, log_high + 1e-6)
    kinds = jax.random.uniform(keys[2], (3, *groups), jnp.float32)
    rate = jnp.where(kinds[0] < 0.7, exact, between)
    if conditions.num_symbols is None:
        num_symbols = jnp.maximum(jnp.round(num_values / (2 * rate)).astype(jnp.int32), conditions.num_blocks)
    else:
        num_symbols = jnp.full(groups, conditions.num_symbols, jnp.int32)
    if conditions.snr_db is None:
        low, high = conditions.min_snr_db, conditions.max_snr_db
        snr_db = jax.random.uniform(keys[3], groups, jnp.float32, low, high)
        energy_db = linear_to_db(num_values / (2.0 * num_symbols.astype(jnp.float32)))
        snr_db = snr_db + jnp.where(conditions.equal_energy & (kinds[1] < 0.5), energy_db, 0.0)
    else:
        snr_db = jnp.full(groups, conditions.snr_db, jnp.float32)
    return Draw(snr_db, num_symbols, kinds[2] < 0.5)


def draw_gains(key: Key[Array, ""], num_blocks: int) -> Float[Array, " t"]:
    """|h_t|^2 [t] of one realisation: Rayleigh (half of them), Rician, Jakes or no fading, with random parameters."""
    key = threefry(key)
    keys = jax.random.split(key, 6)
    k_factor = db_to_linear(jax.random.uniform(keys[0], (), jnp.float32, 0.0, 12.0))
    doppler = 10 ** jax.random.uniform(keys[1], (), jnp.float32, -3.0, -0.5)
    laws = (RayleighFading(), RicianFading(k_factor), JakesFading(doppler), NoFading())
    gains = jnp.stack([law.sample(k, num_blocks) for law, k in zip(laws, keys[2:], strict=True)])
    choice = jax.random.uniform(jax.random.fold_in(key, 6), (), jnp.float32)
    kind = jnp.searchsorted(jnp.array([0.5, 0.65, 0.8], jnp.float32), choice)
    return squared_magnitude(gains[kind])


def draw_power(key: Key[Array, ""], load: Float[Array, " t"]) -> Float[Array, " t"]:
    """Block powers of mean 1: the codec's load (half of them), equal, or one of these times random factors."""
    kind_key, noise_key, spread_key = jax.random.split(threefry(key), 3)
    kind = jax.random.uniform(kind_key, (2,), jnp.float32)
    spread = jax.random.uniform(spread_key, (), jnp.float32, maxval=1.5)
    factors = jnp.exp(spread * jax.random.normal(noise_key, load.shape, jnp.float32))
    power = jnp.where(kind[0] < 0.65, load, 1.0) * jnp.where(kind[1] < 0.3, factors, 1.0)
    return power / power.mean()


def group_moments(values: Float[Array, "g b n"]) -> tuple[Float[Array, "g 1 n"], Float[Array, "g 1 n"]]:
    """Mean and standard deviation of every value over its group."""
    mean = values.mean(1, keepdims=True)
    return mean, jnp.sqrt(jnp.square(values - mean).mean(1, keepdims=True) + 1e-6)


def codec_loss(graph: nnx.GraphDef, conditions: Conditions, decode_images: DecodeImages | None = None) -> Callable:
    """Loss `(params, data, key) -> (dB, metrics)`: mean over groups of the group's NMSE in dB.

    `data` holds `constants`, `total_variance` and `latents`, a tuple of one or two sets [n h w c] or [n k], k = h w c,
    of which the first gives `first_share` of the draws; a TPU draws rows [n k] without copying the set. With
    `decode_images`, `image_weight` of the loss is the decoded images' MSE in dB.
    """
    mixed = conditions.image_weight > 0
    require(not mixed or decode_images is not None, "image_weight", conditions.image_weight, "0 without image decoder")
    size, blocks = conditions.group_size, conditions.num_blocks

    def loss_fn(params, data, key):
        keys = jax.random.split(threefry(key), 5)
        network: SeedNetwork = nnx.merge(graph, params, data["constants"])
        draw = draw_conditions(keys[0], conditions, network.config.num_values)
        latents = draw_latents(keys[1], data["latents"], conditions).reshape(-1, *network.config.latent_shape)
        row, column = (jnp.repeat(x, size) for x in network.mode(draw.snr_db, draw.num_symbols))
        values = network.analyse(latents, row, column).reshape(conditions.groups, size, -1)
        mean, std = group_moments(values)
        received = jax.vmap(transmit_group, (0, 0, 0, 0, None))(
            jax.random.split(keys[2], conditions.groups),
            (values - mean) / std,
            jax.vmap(network.spend)(draw.snr_db, draw.num_symbols),
            draw,
            blocks,
        )
        estimate, snr = (x.reshape(-1, x.shape[-1]) for x in received)
        snr_db, num_symbols = (jnp.repeat(x, size) for x in (draw.snr_db, draw.num_symbols))
        moments = tuple(jnp.repeat(x[:, 0], size, axis=0) for x in (mean, std))
        decoded = network.decode(estimate, snr, snr_db, num_symbols, moments)
        error = jnp.square(decoded - latents).sum((1, 2, 3)).reshape(conditions.groups, size).mean(1)
        nmse_db = linear_to_db(error / data["total_variance"]).mean()
        if not mixed:
            return nmse_db, {}
        difference = jnp.square(decode_images(decoded) - decode_images(latents))
        image_db = linear_to_db(difference.reshape(conditions.groups, -1).mean(1)).mean()
        loss = (1 - conditions.image_weight) * nmse_db + conditions.image_weight * image_db
        return loss, {"nmse_db": nmse_db, "image_mse_db": image_db}

    return loss_fn


def draw_latents(
    key: Key[Array, ""], sets: tuple[Float[Array, "_ *k"], ...], conditions: Conditions
) -> Float[Array, "b *k"]:
    """A batch with `first_share` of its rows from the first set, group by group alike, the others from the second."""
    first_key, second_key = jax.random.split(threefry(key))
    groups, size = conditions.groups, conditions.group_size
    first = size if len(sets) == 1 else round(conditions.first_share * size)
    parts = [sets[0][jax.random.randint(first_key, (groups, first), 0, len(sets[0]), jnp.int32)]]
    if first < size:
        rest = jax.random.randint(second_key, (groups, size - first), 0, len(sets[1]), jnp.int32)
        parts.append(sets[1][rest])
    batch = jnp.concatenate(parts, axis=1)
    return batch.reshape(-1, *batch.shape[2:])


def transmit_group(
    key: Key[Array, ""], values: Float[Array, "b n"], spend: Float[Array, " n"], draw: Draw, num_blocks: int
) -> link.Received:
    """Random fading, powers and noise for the latents of one group."""
    block = link.block_of_value(values.shape[1], draw.num_symbols, num_blocks, draw.interleaved)
    spending = link.split_load(spend, draw.num_symbols, block, num_blocks)

    def one(key, values):
        gain_key, power_key, noise_key = jax.random.split(key, 3)
        block_snr = draw_gains(gain_key, num_blocks) * draw_power(power_key, spending.load)
        snr = link.value_snr(spending, db_to_linear(draw.snr_db) * block_snr, block)
        return link.receive_values(noise_key, values, snr)

    return jax.vmap(one)(jax.random.split(threefry(key), len(values)), values)


def initial_network(config: SeedCodecConfig, latents: Float[np.ndarray, "n h w c"], seed: int = 0) -> SeedNetwork:
    """A network that is the KLT scheme of these latents (the raw latent's, with transform "raw").

    Its loads minimise the error averaged over Rayleigh fading and none. ValueError for latents of another shape.
    """
    require(latents.shape[1:] == config.latent_shape, "latents' shape", latents.shape[1:], str(config.latent_shape))
    network = SeedNetwork(config, nnx.Rngs(seed))
    tiles = np.concatenate(
        [np.asarray(network.tiles(jnp.asarray(part))) for part in np.array_split(latents, -(-len(latents) // 1000))]
    )
    if config.transform == "raw":
        channels = latents.reshape(-1, config.latent_shape[2]).astype(np.float64)
        repeats = config.tile_values // config.latent_shape[2]
        network.latent_mean[...] = jnp.asarray(np.tile(channels.mean(0), repeats), jnp.float32)
        network.scale[...] = jnp.asarray(np.tile(channels.std(0), repeats), jnp.float32)
        return network
    statistics = latent_statistics(tiles.reshape(-1, 1, 1, config.tile_values))
    network.latent_mean[...] = statistics.mean
    network.scale[...] = jnp.sqrt(statistics.variances)
    network.basis[...] = statistics.basis
    logits, nmse = klt_tables(config, statistics)
    network.load_logits[...], network.encoder_scale[...] = logits, jnp.sqrt(nmse)
    return network


def klt_tables(
    config: SeedCodecConfig, statistics: LatentStatistics
) -> tuple[Float[Array, "s r n"], Float[Array, "s r"]]:
    """Logarithms of the best loads for the coefficients of a tile, and the NMSE, over the grid of SNRs and rates."""

    def mean_error(x):
        return 0.5 * (mean_lmmse_error_awgn(x) + mean_lmmse_error_rayleigh(x))

    size = config.tile_values
    counts = np.ceil(size / config.rate_grid).astype(int)
    sent = (np.arange(size) < counts[:, None]).astype(np.float32)

    def solve(snr_db, mask, share):
        snr = db_to_linear(snr_db) * share
        load = static_load(statistics.variances * mask, snr, mean_error)
        return jnp.log(jnp.maximum(load * share, SMALLEST_LOAD)), klt_nmse(statistics, load, snr, mean_error)

    over_rates = jax.vmap(solve, (None, 0, 0))
    shares = jnp.asarray(counts / size, jnp.float32)
    table, nmse = jax.jit(jax.vmap(over_rates, (0, None, None)))(
        jnp.asarray(config.snr_grid_db, jnp.float32), jnp.asarray(sent), shares
    )
    # Values beyond a rate's last are sent at slightly lower rates: they take the load that they have there.
    for column in range(1, config.rate_steps):
        table = table.at[:, column].set(jnp.where(sent[column] > 0, table[:, column], table[:, column - 1]))
    return table, nmse


def calibrate(network: SeedNetwork, latents: Float[np.ndarray, "n h w c"], batch: int = 1000) -> SeedNetwork:
    """The network with the mean and variance of every value measured over `latents`, at every grid point.

    From then on each value has zero mean and unit variance over them, exactly but for rounding.
    """
    network = nnx.clone(network)  # its variables may be shared with a state that others hold
    config = network.config
    if network.encoder is None:
        points = [(0, 0)]
    else:
        points = [(row, column) for row in range(config.snr_steps) for column in range(config.rate_steps)]
    graph, state = nnx.split(network)

    @jax.jit
    def moments(state, part, row, column):
        rows, columns = (jnp.full(len(part), x) for x in (row, column))
        values = nnx.merge(graph, state).analyse(part, rows, columns)
        return values.sum(0), jnp.square(values).sum(0)

    parts = np.array_split(latents, -(-len(latents) // batch))
    mean, std = (np.array(x[...]) for x in (network.code_mean, network.code_std))
    for row, column in points:
        sums = [jax.device_get(moments(state, part, row, column)) for part in parts]
        first, second = (np.sum([s[i] for s in sums], axis=0, dtype=np.float64) / len(latents) for i in range(2))
        where = (row, column) if network.encoder is not None else ...
        mean[where], std[where] = first, np.sqrt(np.maximum(second - first**2, 1e-12))
    network.code_mean[...], network.code_std[...] = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return network
