"""Tests of the codec's networks: tiles, whitening, modes, the KLT they start from, nesting, shapes and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.channel import post_equalisation_snr
from megjax.codec import SeedCodecConfig, SeedNetwork, link
from megjax.codec.linear import LatentStatistics, klt_decode, klt_encode
from megjax.units import db_to_linear, noise_var_from_snr_db

EPS = 2.0**-24
NUM_BLOCKS = 4
TILED = dict(latent_shape=(6, 4, 2), tile=(3, 2))


def merge(parts):
    return nnx.merge(parts.graph, parts.state)


@pytest.mark.parametrize(("shape", "tile"), [((6, 4, 2), (6, 4)), ((6, 4, 2), (3, 2)), ((16, 16, 4), (8, 8))])
def test_tiles(shape, tile):
    config = SeedCodecConfig(latent_shape=shape, tile=tile, width=8, hidden=8, snr_steps=2, rate_steps=2)
    network = nnx.eval_shape(lambda: SeedNetwork(config, nnx.Rngs(0)))
    latents = np.arange(3.0 * config.num_values, dtype=np.float32).reshape(3, *shape)
    tiles, again = jax.jit(lambda z: (network.tiles(z), network.from_tiles(network.tiles(z))))(latents)
    assert tiles.shape == (3, config.num_tiles, config.tile_values)
    np.testing.assert_array_equal(again, latents)
    across = shape[1] // tile[1]
    for i in range(config.num_tiles):
        rows, columns = ((i // across) * tile[0], (i % across) * tile[1])
        part = latents[:, rows : rows + tile[0], columns : columns + tile[1]]
        np.testing.assert_array_equal(tiles[:, i], part.reshape(3, -1))


def test_whitening(plain, latents):
    @jax.jit
    def whiten(latents):
        values = merge(plain).whiten(latents)
        return values[:, 0], merge(plain).colour(values)

    values, again = map(np.asarray, whiten(latents))
    # Rounding of the centred latent, of size 3 or so, relative to the smallest coefficient's deviation.
    scale = np.asarray(merge(plain).scale[...])
    tolerance = np.sqrt(values.shape[1]) * 8 * EPS * np.abs(latents).max() / scale.min()
    np.testing.assert_allclose(np.mean(values, 0), 0, atol=tolerance)
    np.testing.assert_allclose(np.cov(values, rowvar=False, ddof=0), np.eye(values.shape[1]), atol=2 * tolerance)
    assert np.all(np.diff(scale) <= 0)
    np.testing.assert_allclose(again, latents, atol=np.sqrt(values.shape[1]) * 8 * EPS * np.abs(latents).max())


def test_modes(plain):
    # Grids: -15, 10 and 35 dB; r = 1, 2.83 and 8, which are 24, 8.5 and 3 symbols of the 48 values.
    cases = {
        (-100.0, 24): (0, 0),
        (-15.0, 24): (0, 0),
        (-2.6, 24): (0, 0),
        (-2.4, 24): (1, 0),
        (10.0, 9): (1, 1),
        (22.6, 8): (2, 1),
        (35.0, 3): (2, 2),
        (100.0, 1): (2, 2),
        (0.0, 15): (1, 0),
        (0.0, 14): (1, 1),
    }
    snr_db, num_symbols = map(np.array, zip(*cases, strict=True))
    found = jax.jit(merge(plain).mode)(snr_db.astype(np.float32), num_symbols)
    np.testing.assert_array_equal(np.stack(found, -1), list(cases.values()))


def test_power_is_interpolated_over_the_grid(stirred):
    network = merge(stirred)
    spend = jax.jit(lambda snr_db, k: merge(stirred).spend(snr_db, k))
    table = np.asarray(network.load_logits[...])
    # At grid points the table itself; the rate grid's r = 8 is 3 symbols, r = 1 is 24.
    tolerance = dict(rtol=20 * EPS * np.abs(table).max())
    np.testing.assert_allclose(spend(-15.0, 24), np.exp(table[0, 0]), **tolerance)
    np.testing.assert_allclose(spend(35.0, 3), np.exp(table[2, 2]), **tolerance)
    np.testing.assert_allclose(spend(-80.0, 24), spend(-15.0, 24), rtol=0)
    np.testing.assert_allclose(spend(80.0, 1), spend(35.0, 3), rtol=0)
    # A fifth of the way from -15 to 10 dB, and two thirds of that from 24 symbols to 24 / sqrt(8), r = 2.
    log_spend = 0.8 * table[0] + 0.2 * table[1]
    np.testing.assert_allclose(spend(-10.0, 12), np.exp(log_spend[0] / 3 + 2 * log_spend[1] / 3), **tolerance)


def test_it_starts_as_the_klt_scheme(plain, latents):
    """Same latents, loads, gains and noise: what arrives is the linear scheme's reconstruction; the trunks give 0."""
    num_symbols, snr_db, mapping = 13, 4.0, "ordered"
    network = merge(plain)
    statistics = LatentStatistics(network.latent_mean[...], jnp.square(network.scale[...]), network.basis[...])
    rng = np.random.default_rng(0)
    gains = jnp.asarray(rng.normal(size=NUM_BLOCKS) + 1j * rng.normal(size=NUM_BLOCKS), jnp.complex64)
    power, noise_var = jnp.array([1.5, 0.2, 0.0, 2.3]), noise_var_from_snr_db(snr_db)

    @jax.jit
    def both(batch):
        network, keys = merge(plain), jax.random.split(jax.random.key(0), len(batch))
        spending = link.spending(network.spend(snr_db, num_symbols), num_symbols, NUM_BLOCKS, mapping)
        through = functools.partial(link.send_code, num_symbols=num_symbols, mapping=mapping)

        def send(keys, values):
            return jax.vmap(lambda k, x: through(k, x, spending, gains, power, noise_var))(keys, values)

        received = send(keys, network.encode(batch, snr_db, num_symbols))
        condition = jnp.full(len(batch), snr_db), jnp.full(len(batch), num_symbols)
        learned = network.decode(*received, *condition)
        sent = 2 * num_symbols
        received = send(jax.random.clone(keys), jax.vmap(lambda z: klt_encode(statistics, z))(batch))
        decode = jax.vmap(lambda x, snr: klt_decode(statistics, x[:sent], snr[:sent], (6, 4, 2)))
        x, features = batch.reshape(len(batch), 1, -1), jnp.stack(condition, -1) / 10
        trunks = network.encoder(x, features), network.decoder(jnp.concatenate([x, x], -1), features)
        return learned, decode(*received), trunks

    learned, linear, trunks = both(latents[:4])
    # Sums of 48 products of numbers of order 3.
    np.testing.assert_allclose(learned, linear, atol=48 * 8 * EPS)
    for output in trunks:
        np.testing.assert_array_equal(output, 0)


def test_prefixes_are_nested(encode, latents):
    """Within a mode neither SNR nor rate changes a value; in another mode they differ."""
    batch = latents
    reference = encode(batch, -5.0, 16)
    for snr_db, num_symbols in ((-5.0, 24), (-5.0, 19), (-2.6, 17), (-40.0, 16)):
        np.testing.assert_array_equal(encode(batch, snr_db, num_symbols), reference)
    for snr_db, num_symbols in ((5.0, 16), (-5.0, 10)):
        assert np.abs(encode(batch, snr_db, num_symbols) - reference).max() > 0.01


def test_the_decoder_uses_what_it_is_told(stirred, latents):
    """Estimates, their SNRs, the code's SNR and its rate all reach the output; values that were not sent do not."""
    decode = jax.jit(lambda *arguments: merge(stirred).decode(*arguments))
    estimate = latents[:2].reshape(2, -1)
    snr_db, num_symbols = np.full(2, 5.0, np.float32), np.full(2, 12)
    sent = np.arange(48)[None] < 24
    snr = np.where(sent, np.float32(3.0), np.zeros((2, 48), np.float32))
    reference = decode(estimate, snr, snr_db, num_symbols)
    dirty = np.where(sent, estimate, np.float32(7.0))
    np.testing.assert_array_equal(decode(dirty, snr, snr_db, num_symbols), reference)
    changed = [
        decode(np.float32(1.1) * estimate, snr, snr_db, num_symbols),
        decode(estimate, np.float32(1.5) * snr, snr_db, num_symbols),
        decode(estimate, snr, snr_db + 1, num_symbols),
        decode(estimate, snr, snr_db, num_symbols + 1),
    ]
    for output in changed:
        assert np.all(np.abs(output - reference).max((1, 2, 3)) > 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        TILED,
        dict(latent_shape=(6, 4, 2), tile=(6, 4), transform="raw", encoder_blocks=0),
        pytest.param(dict(latent_shape=(64, 64, 4), tile=(8, 8)), marks=pytest.mark.slow),
    ],
    ids=["tiled", "raw", "stable-diffusion"],
)
def test_shapes_of_a_whole_trip(settings, blank_network, stir_network):
    """Any latent shape: values and power for each number, and latents back; close to it when nothing is lost."""
    config = SeedCodecConfig(width=8, hidden=8, decoder_blocks=1, snr_steps=2, rate_steps=2, **settings)
    network = blank_network(config)
    graph, state = nnx.split(network)
    latents = np.random.default_rng(0).normal(size=(2, *config.latent_shape)).astype(np.float32)
    num_symbols = config.num_values // 2

    @jax.jit
    def trip(state, latents, snr):
        network = nnx.merge(graph, state)
        values, spend = network.encode(latents, 10.0, num_symbols), network.spend(10.0, num_symbols)
        condition = jnp.full(len(latents), 10.0), jnp.full(len(latents), num_symbols)
        decoded = network.decode(values, jnp.full(values.shape, snr), *condition)
        return values, spend, decoded, network.tiles(latents)

    values, spend, decoded, tiles = trip(state, latents, 3.0)
    assert values.shape == (2, config.num_values) and spend.shape == (config.num_values,)
    # Statistics at their start, 0 and 1, make this the identity but for the order of the values.
    np.testing.assert_allclose(decoded, latents, atol=8 * EPS * np.abs(latents).max())
    np.testing.assert_allclose(values[:, : config.num_tiles], tiles[:, :, 0], rtol=4 * EPS)
    # A latent comes out the same in any batch; a change of one number reaches every tile.
    stirred = nnx.state(stir_network(network))
    both = [np.asarray(x) for x in trip(stirred, latents, 3.0)[::2]]
    other = latents[[1, 1]]
    other[1].flat[0] += 1
    others = [np.asarray(x) for x in trip(stirred, other, 3.0)[::2]]
    for whole, half in zip(both, others, strict=True):
        assert np.all(np.isfinite(whole))
        np.testing.assert_allclose(half[0], whole[1], atol=100 * EPS * np.abs(whole).max())
    if settings is TILED:
        changed = np.abs(others[0][1] - others[0][0]).reshape(-1, config.num_tiles)
        assert np.all(changed.max(0) > 1e-4)
    assert np.abs(both[1] - decoded).max() > 0.01
    # What the decoder adds shrinks with the error of linear reception, as 1 / sqrt(1 + snr).
    if config.encoder_blocks == 0:
        assert np.abs(trip(stirred, latents, 1e8)[2] - decoded).max() < 1e-3


@pytest.mark.slow
def test_gradients_at_the_edges(stirred, latents):
    """Encoder, channel and decoder in one: finite at h = 0, power 0 and -30 dB, with respect to everything."""
    num_symbols, mapping = 19, "interleaved"
    graph, constants, batch = stirred.loss_graph, stirred.constants, latents[:3]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradient(params, batch, gains, power, snr_db):
        network = nnx.merge(graph, params, constants)
        values, noise_var = network.encode(batch, snr_db, num_symbols), db_to_linear(-snr_db)
        block = link.block_of_value(48, num_symbols, NUM_BLOCKS, True)
        spending = link.split_load(network.spend(snr_db, num_symbols), num_symbols, block, NUM_BLOCKS)
        power = power * spending.load
        snr = link.value_snr(spending, post_equalisation_snr(gains, power, noise_var), block)

        def send(key, values):
            code = values, spending, gains, power, noise_var
            keys = jax.random.split(key)
            return link.send_code(keys[0], *code, num_symbols, mapping), link.receive_values(keys[1], values, snr)

        received = jax.vmap(send)(jax.random.split(jax.random.key(0), len(batch)), values)
        received = jax.tree.map(lambda *ways: jnp.concatenate(ways), *received)
        condition = jnp.full(2 * len(batch), snr_db), jnp.full(2 * len(batch), num_symbols)
        return jnp.square(network.decode(*received, *condition) - jnp.concatenate([batch, batch])).sum()

    gains = np.array([1.0, 0.3 - 0.5j, 0.9j, -1.4], np.complex64)
    power = np.array([0.5, 1.5, 1.2, 0.8], np.float32)
    params, *others = gradient(stirred.params, batch, gains, power, 8.0)
    for leaf in jax.tree.leaves((params, others)):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0)
    assert np.all(np.asarray(others[1]) != 0) and np.all(np.asarray(others[2]) != 0)
    for present in (1, np.arange(NUM_BLOCKS) != 1, 0):
        for powered in (1, np.arange(NUM_BLOCKS) != 0, 0):
            h, p = gains * np.float32(present), power * np.float32(powered)
            for leaf in jax.tree.leaves(gradient(stirred.params, batch, h, p, -30.0)):
                assert np.all(np.isfinite(leaf))


def test_derived_sizes():
    config = SeedCodecConfig(latent_shape=(16, 16, 4), tile=(8, 8), snr_steps=3, rate_steps=4)
    assert (config.num_values, config.num_tiles, config.tile_values) == (1024, 4, 256)
    np.testing.assert_allclose(config.snr_grid_db, [-15, 10, 35])
    np.testing.assert_allclose(config.rate_grid, [1, 2, 4, 8])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("latent_shape", dict(latent_shape=(8, 8))),
        ("latent_shape", dict(latent_shape=(8, 0, 4))),
        ("tile", dict(tile=(3, 8))),
        ("tile", dict(tile=(8, 8, 4))),
        ("width", dict(width=0)),
        ("hidden", dict(hidden=True)),
        ("decoder_blocks", dict(decoder_blocks=0)),
        ("encoder_blocks", dict(encoder_blocks=-1)),
        ("encoder_blocks", dict(transform="raw")),
        ("transform", dict(transform="dct")),
        ("SNR grid", dict(min_snr_db=5.0, max_snr_db=5.0)),
        ("SNR grid", dict(snr_steps=1)),
        ("rate_steps", dict(rate_steps=1)),
        ("rate_steps", dict(max_log2_rate=0.0)),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_named(name, values):
    with pytest.raises(ValueError, match=f"^codec: {name} is "):
        SeedCodecConfig(**values)
