"""Tests of the codec's training: draws, loss, start, calibration, and that a run learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from megjax.channel import MAPPINGS
from megjax.codec import SeedCodecConfig, fitting, link
from megjax.codec.fitting import Conditions
from megjax.precision import promoting
from tests.checks import STANDARD_ERRORS, assert_equal_trees, within_standard_error
from tests.products import inexact_products

EPS = 2.0**-24
# The statistics are sums of 1000 float32 terms at a time, whose rounding is at most this.
MOMENT_ERROR = 1000 * EPS
SNR_DB = -5.0
SPECIAL = dict(groups=2, group_size=64, num_blocks=4, snr_db=SNR_DB, num_symbols=8)
IMAGE_WEIGHT = 0.25


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def total_variance(latents):
    return float(latents.astype(np.float64).var(0).sum())


def decode_images(latents):
    return jax.nn.sigmoid(latents[..., :1] * jnp.ones((1, 1, 1, 3)))


@pytest.fixture(scope="module")
def data(plain, latents):
    return {
        "constants": plain.constants,
        "total_variance": jnp.float32(total_variance(latents)),
        "latents": (jnp.asarray(latents),),
    }


@pytest.fixture(scope="module")
def value_and_grad(plain):
    """Loss, metrics and gradient of `(params, data, key)`, with images in the loss."""
    conditions = Conditions(**SPECIAL, image_weight=IMAGE_WEIGHT)
    loss = fitting.codec_loss(plain.loss_graph, conditions, decode_images)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def nmse_db(data, value_and_grad):
    """The NMSE of parameters in thirty draws, always the same."""
    return lambda params: np.array([value_and_grad(params, data, key)[0][1]["nmse_db"] for key in keys(0, 30)])


def test_training_learns(plain, data, value_and_grad, nmse_db):
    """The start is the best linear scheme; twelve patterns leave it far from the best of all."""
    optimizer, params = optax.adam(1e-2), plain.params
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(params, opt_state, gradients):
        updates, opt_state = promoting(optimizer.update)(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for key in keys(9, 30):
        params, opt_state = update(params, opt_state, value_and_grad(params, data, key)[1])
    gain_db = nmse_db(plain.params) - nmse_db(params)
    assert gain_db.mean() > STANDARD_ERRORS * gain_db.std(ddof=1) / np.sqrt(len(gain_db))


@pytest.mark.slow
def test_the_loss_starts_at_the_error_of_the_klt(plain, data, nmse_db, gains, draw_powers):
    """The mean NMSE in dB at the start against the formula for the same scheme, averaged over the same law of gains."""
    samples, network = nmse_db(plain.params), nnx.merge(plain.graph, plain.state)
    spend, variances = jax.jit(network.spend)(SNR_DB, 8), np.square(network.scale[...])
    expected = []
    for mapping, of_mapping in zip(MAPPINGS, np.split(gains, 2), strict=True):
        load, shape = link.spending(spend, 8, 4, mapping)
        block = np.asarray(link.block_of_value(48, 8, 4, mapping == "interleaved"))
        block_snr = 10 ** (SNR_DB / 10) * of_mapping * draw_powers(load)[: len(of_mapping)]
        # Of every value, its variance over 1 + snr, averaged over a group.
        error = (variances / (1 + np.asarray(shape) * block_snr[:, block])).sum(1).reshape(-1, 64).mean(1)
        expected.append(10 * np.log10(error / float(data["total_variance"])))
    expected = np.concatenate(expected)
    error = np.sqrt(samples.var(ddof=1) / len(samples) + expected.var(ddof=1) / len(expected))
    # Moments of the group's own 64 latents, one mean and one variance a value, flatter it by at most 2 / 64.
    difference = samples.mean() - expected.mean()
    assert 10 * np.log10(1 - 2 / 64) - STANDARD_ERRORS * error <= difference <= STANDARD_ERRORS * error


def test_images_join_the_loss(stirred, data, value_and_grad):
    data = data | {"constants": stirred.constants}
    (value, metrics), gradients = value_and_grad(stirred.params, data, jax.random.key(2))
    assert metrics.keys() == {"nmse_db", "image_mse_db"}
    assert np.isfinite(value) and metrics["image_mse_db"] < 0
    expected = (1 - IMAGE_WEIGHT) * metrics["nmse_db"] + IMAGE_WEIGHT * metrics["image_mse_db"]
    np.testing.assert_allclose(value, expected, rtol=4 * EPS)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0)
    alone = fitting.codec_loss(stirred.loss_graph, Conditions(**SPECIAL))
    value, metrics = jax.eval_shape(alone, stirred.params, data, jax.random.key(2))
    assert value.shape == () and metrics == {}
    with pytest.raises(ValueError, match="^image_weight is 0.25; it must be 0 without image decoder"):
        fitting.codec_loss(stirred.loss_graph, Conditions(image_weight=IMAGE_WEIGHT))


def drawn(**conditions):
    """Draws of conditions for many groups; not compiled as one, as their parts are alike for all conditions."""
    draw = fitting.draw_conditions(jax.random.key(3), Conditions(groups=10_000, **conditions), 256)
    return jax.tree.map(np.asarray, draw)


def test_draws_of_rate_snr_and_mapping():
    draw = drawn(num_blocks=20)
    assert draw.num_symbols.dtype == np.int32 and draw.snr_db.dtype == np.float32
    # Rates 1, 2, 4, 8 of 256 values: 128, 64, 32 and, for want of symbols for 20 blocks, 20.
    assert draw.num_symbols.min() == 20 and draw.num_symbols.max() == 128
    energy_db = 10 * np.log10(128 / draw.num_symbols)
    assert np.all(draw.snr_db >= -15) and np.all(draw.snr_db <= 25 + energy_db + 1e-5)
    assert draw.snr_db.max() > 25  # some at equal energy
    # Half of the draws take equal energy: the mean offset is half of the mean energy ratio.
    within_standard_error(draw.snr_db - 5 - 0.5 * energy_db, 0.0)
    within_standard_error(draw.interleaved, 0.5)
    # 0.7 of the draws are exact, half of them these; of the others about one in 10 comes out as 64 or 128.
    samples = np.isin(draw.num_symbols, (64, 128))
    assert samples.mean() > 0.35 - STANDARD_ERRORS * samples.std(ddof=1) / np.sqrt(samples.size)
    # Rates between the exact ones occur, everywhere.
    between = draw.num_symbols[~np.isin(draw.num_symbols, (20, 32, 64, 128))]
    assert between.size > 0.2 * samples.size and np.unique(between).size > 80


def test_draws_at_equal_power_only():
    draw = drawn(equal_energy=False, min_snr_db=-3.0, max_snr_db=7.0, rates=(2.0,))
    assert draw.snr_db.min() >= -3 and draw.snr_db.max() <= 7
    np.testing.assert_array_equal(draw.num_symbols, 64)
    within_standard_error(draw.snr_db, 2.0)


def test_draws_of_a_specialist():
    draw = drawn(snr_db=3.5, num_symbols=37)
    np.testing.assert_array_equal(draw.snr_db, 3.5)
    np.testing.assert_array_equal(draw.num_symbols, 37)
    assert draw.num_symbols.dtype == np.int32 and 0 < draw.interleaved.mean() < 1


@pytest.fixture(scope="module")
def gains():
    """Gains [n t] of many realisations."""
    draw = jax.jit(jax.vmap(lambda key: fitting.draw_gains(key, SPECIAL["num_blocks"])))
    return np.asarray(draw(keys(4, 2**14)), np.float64)


@pytest.fixture(scope="module")
def draw_powers():
    """Powers [n t] in many realisations for a load [t]."""
    draw = jax.jit(jax.vmap(fitting.draw_power, (0, None)))
    return lambda load: np.asarray(draw(keys(5, 2**14), load), np.float64)


@pytest.mark.slow
def test_draws_of_gains(gains):
    assert gains.shape == (2**14, 4) and np.all(gains >= 0)
    # Realisations are independent, blocks are not.
    within_standard_error(gains, 1.0, axis=0)
    # A fifth has no fading, half is Rayleigh: of these P(g < 0.1) = 1 - exp(-0.1); Jakes' share, 0.15, has that too.
    within_standard_error(np.all(np.abs(gains - 1) < 1e-5, axis=1), 0.2)
    deep = gains[:, 0] < 0.1
    error = STANDARD_ERRORS * deep.std() / np.sqrt(deep.size)
    rayleigh = 0.65 * (1 - np.exp(-0.1))
    assert rayleigh - error <= deep.mean() <= rayleigh + 0.15 * (1 - np.exp(-0.1)) + error


@pytest.mark.slow
def test_draws_of_powers(draw_powers):
    load = jnp.array([2.0, 1.0, 0.7, 0.3])
    powers = draw_powers(load)
    assert np.all(powers >= 0)
    np.testing.assert_allclose(powers.mean(1), 1, rtol=8 * EPS)
    for exact, share in ((load, 0.65 * 0.7), (np.ones(4), 0.35 * 0.7)):
        within_standard_error(np.all(np.abs(powers - np.asarray(exact)) < 1e-6, axis=1), share)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 5), (1.0, 10)])
def test_draws_of_latents(share, expected):
    values = np.broadcast_to(np.arange(200, dtype=np.float32)[:, None, None, None], (200, 2, 1, 1))
    first, second = jnp.asarray(values[:50]), jnp.asarray(values[100:])
    conditions = Conditions(groups=3, group_size=10, first_share=share)
    batch = np.asarray(fitting.draw_latents(jax.random.key(6), (first, second), conditions))
    assert batch.shape == (30, 2, 1, 1)
    np.testing.assert_array_equal((batch[:, 0, 0, 0].reshape(3, 10) < 100).sum(1), expected)
    assert np.unique(batch).size > 10
    # With one set the share says nothing.
    alone = np.asarray(fitting.draw_latents(jax.random.key(7), (first,), conditions))
    assert alone.shape == (30, 2, 1, 1) and alone.max() < 100


def test_moments_of_a_group():
    values = np.random.default_rng(8).normal(3, 2, (2, 50, 4)).astype(np.float32)
    mean, std = map(np.asarray, jax.jit(fitting.group_moments)(values))
    assert mean.shape == std.shape == (2, 1, 4)
    standard = ((values - mean) / std).astype(np.float64)
    np.testing.assert_allclose(standard.mean(1), 0, atol=50 * EPS)
    # 1e-6 is added to a variance of about 4.
    np.testing.assert_allclose(np.square(standard).mean(1), 1, atol=1e-6 + 50 * EPS)


def test_calibration_is_exact_at_every_grid_point(stirred, latents, encode):
    network, config = nnx.merge(stirred.graph, stirred.state), stirred.config
    grid = [(snr_db, rate) for snr_db in config.snr_grid_db for rate in config.rate_grid]
    snr_db, num_symbols = np.array([(snr_db, round(config.num_values / (2 * rate))) for snr_db, rate in grid]).T
    modes = np.stack(jax.jit(network.mode)(snr_db.astype(np.float32), num_symbols.astype(np.int32)))
    assert np.unique(modes, axis=1).shape == (2, config.snr_steps * config.rate_steps)
    for point in zip(snr_db.tolist(), num_symbols.astype(int).tolist(), strict=True):
        values = np.asarray(encode(latents, *point), np.float64)
        np.testing.assert_allclose(values.mean(0), 0, atol=2 * MOMENT_ERROR)
        np.testing.assert_allclose(values.var(0), 1, rtol=2 * MOMENT_ERROR)


def test_the_raw_network(latents):
    """Values in the latent's own order, standardised per place, with the same moments at every grid point."""
    config = SeedCodecConfig(
        latent_shape=(6, 4, 2),
        tile=(6, 4),
        width=16,
        hidden=16,
        decoder_blocks=1,
        transform="raw",
        encoder_blocks=0,
        snr_steps=2,
        rate_steps=2,
    )
    initial = fitting.initial_network(config, latents)
    before = jax.tree.map(np.array, nnx.state(initial))
    network = fitting.calibrate(initial, latents)
    # Calibration has left the network that it was given alone.
    assert_equal_trees(before, nnx.state(initial))
    assert np.abs(network.code_mean[...] - before["code_mean"][...]).max() > 0.1
    graph, state = nnx.split(network)
    values = jax.jit(lambda z: nnx.merge(graph, state).encode(z, 20.0, 24))(latents)
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    np.testing.assert_allclose(values, (flat - flat.mean(0)) / flat.std(0), atol=10 * MOMENT_ERROR)
    np.testing.assert_array_equal(network.code_mean[1, 1], network.code_mean[0, 0])


def test_the_start_of_training(plain, latents):
    """Statistics of the latents, and loads that fall along the coefficients and are spread wider at low SNR."""
    network, config = nnx.merge(plain.graph, plain.state), plain.config
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    np.testing.assert_allclose(network.latent_mean[...], flat.mean(0), rtol=4 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(np.square(network.scale[...]).sum(), total_variance(latents), rtol=48 * EPS)
    logits, nmse = np.asarray(network.load_logits[...]), np.square(network.encoder_scale[...])
    assert logits.shape == (3, 3, 48) and nmse.shape == (3, 3)
    assert np.all(np.isfinite(logits)) and np.all((nmse > 0) & (nmse < 1))
    # More SNR and more symbols leave less error.
    assert np.all(np.diff(nmse, axis=0) < 0) and np.all(np.diff(nmse, axis=1) > 0)
    # At -15 dB only the first patterns are worth their power: loads fall from first to last.
    for column, rate in enumerate(config.rate_grid):
        sent = int(np.ceil(48 / rate))
        assert np.all(np.diff(logits[0, column, :sent]) <= 1e-4)
    # Loads are of mean 1 over the values that are sent; the floor, 1e-4, can only raise it.
    mean = np.exp(logits[:, 0].astype(np.float64)).mean(1)
    assert np.all((mean >= 1 - 100 * EPS) & (mean <= 1 + 1e-4 + 100 * EPS))


def test_latents_that_do_not_fit(config):
    with pytest.raises(ValueError, match=r"^latents' shape is \(4, 6, 2\); it must be \(6, 4, 2\)"):
        fitting.initial_network(config, np.zeros((10, 4, 6, 2), np.float32))
    broken = np.random.default_rng(0).normal(size=(10, 6, 4, 2)).astype(np.float32)
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="^latents is '?1 of 10 not finite"):
        fitting.initial_network(config, broken)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("groups", dict(groups=0)),
        ("group_size", dict(group_size=7)),
        ("group_size", dict(group_size=0)),
        ("num_blocks", dict(num_blocks=0)),
        ("max_snr_db", dict(min_snr_db=5.0, max_snr_db=4.0)),
        ("max_snr_db", dict(max_snr_db=float("nan"))),
        ("rates", dict(rates=())),
        ("rates", dict(rates=(0.5, 2.0))),
        ("image_weight", dict(image_weight=1.5)),
        ("first_share", dict(first_share=-0.1)),
    ],
)
def test_bad_conditions_are_named(name, values):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Conditions(**values)


def test_products_outside_the_networks_are_exact(stirred, data):
    loss = fitting.codec_loss(stirred.loss_graph, Conditions(**SPECIAL))
    assert inexact_products(loss, stirred.params, data, jax.random.key(0), gradient=True) == []
