"""Tests of the analog schemes behind their protocol: energy, gains, closed forms, weights of the blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, NoFading, RayleighFading, symbols_per_block
from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import SeedCodec, SeedCodecConfig, link
from megjax.codec.fitting import calibrate, initial_network
from megjax.codec.linear import klt_load, klt_nmse, latent_statistics
from megjax.codec.schemes import (
    KLTScheme,
    LearnedScheme,
    RawScheme,
    Scheme,
    additive_prediction,
    block_power,
    block_weights,
    draw_gains,
    realisation_keys,
    simulate,
)
from megjax.units import db_to_linear

FOUR_SIGMA = 4.0
SHAPE, SIZE, BLOCKS = (4, 4, 4), 64, 8
NAMES = ("learned", "klt", "raw", "wiener", "denoiser")
CONFIG = SeedCodecConfig(latent_shape=SHAPE, tile=SHAPE[:2], width=8, hidden=8, snr_steps=6, rate_steps=3)


def make_latents(count, seed=0):
    """Gaussian latents [count 4 4 4] of variances over three decades, in one basis; not centred."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(99)
    basis = np.linalg.qr(same.normal(size=(SIZE, SIZE)))[0]
    values = rng.normal(size=(count, SIZE)) * np.geomspace(3, 0.1, SIZE)
    return (0.5 + values @ basis.T).reshape(count, *SHAPE).astype(np.float32)


LATENTS = make_latents(4000)
STATISTICS = latent_statistics(LATENTS)


def learned(**changes):
    """The untrained codec, its code standardised over the latents."""
    network = calibrate(initial_network(dataclasses.replace(CONFIG, **changes), LATENTS), LATENTS)
    codec = SeedCodec(network)
    return LearnedScheme(codec.graph, codec.state)


@pytest.fixture(scope="module")
def schemes():
    raw = RawScheme.of(LATENTS)
    return {
        "learned": learned(),
        "klt": KLTScheme(STATISTICS, SHAPE, mean_lmmse_error_rayleigh),
        "raw": raw,
        "wiener": dataclasses.replace(raw, statistics=STATISTICS),
        "denoiser": learned(transform="raw", encoder_blocks=0),
    }


SPEND = jax.jit(lambda scheme, *args: scheme.spending(*args), static_argnums=(2, 3, 4))
ENCODE = jax.jit(lambda scheme, *args: scheme.encode(*args), static_argnums=3)
DECODE = jax.jit(lambda scheme, *args: scheme.decode(*args), static_argnums=3)
STATIC = ("num_symbols", "num_blocks", "mapping")
SEND_BY_RULE = jax.jit(simulate, static_argnames=(*STATIC, "power"))
SEND_AS_GIVEN = jax.jit(simulate, static_argnames=STATIC)


def send(scheme, latents, snr_db, fading, num_symbols, seed=0, **options):
    keys = realisation_keys(jax.random.key(seed), jnp.arange(len(latents), dtype=jnp.uint32))
    options = {"num_blocks": BLOCKS, **options}
    if options.get("mapping", "ordered") in MAPPINGS and BLOCKS <= num_symbols <= SIZE // 2:
        given = SPEND(scheme, jnp.float32(snr_db), num_symbols, BLOCKS, options.get("mapping", "ordered"))
        options["spending"] = given
    run = SEND_BY_RULE if isinstance(options.get("power", "codec"), str) else SEND_AS_GIVEN
    return run(scheme, keys, jnp.asarray(latents), jnp.float32(snr_db), fading, num_symbols=num_symbols, **options)


def nmse(received, latents):
    """Mean over the latents and its standard error."""
    errors = np.square(np.asarray(received) - latents).sum((1, 2, 3)) / float(STATISTICS.total_variance)
    return errors.mean(), errors.std() / np.sqrt(len(errors))


@pytest.mark.parametrize("name", NAMES)
def test_protocol(schemes, name):
    scheme = schemes[name]
    assert isinstance(scheme, Scheme)
    leaves, structure = jax.tree.flatten(scheme)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure
    spending = SPEND(scheme, jnp.float32(3.0), 16, BLOCKS, "ordered")
    assert spending.load.shape == (BLOCKS,) and spending.shape.shape == (SIZE,)
    np.testing.assert_allclose(spending.load.mean(), 1, rtol=1e-5)
    assert np.all(spending.shape[32:] == 0)
    latents = jnp.asarray(LATENTS[:3])
    values = ENCODE(scheme, latents, jnp.float32(3.0), 16)
    assert values.shape == (3, SIZE) and values.dtype == jnp.float32
    received = link.Received(values, jnp.full((3, SIZE), 1e9))
    # A perfect link of full rate: nothing is lost but rounding, magnified by the whitening's condition of 30.
    np.testing.assert_allclose(DECODE(scheme, received, jnp.float32(3.0), SIZE // 2), latents, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mapping", ["ordered", "interleaved"])
@pytest.mark.parametrize("power", ["codec", "equal"])
def test_radiated_energy_is_the_budget(schemes, name, mapping, power):
    """Over latents whose values are standardised exactly, those that the statistics are of."""
    scheme, budget = schemes[name], 2.5
    num_symbols = SIZE // 2 if name in ("raw", "wiener", "denoiser") else 16
    spending = SPEND(scheme, jnp.float32(4.0), num_symbols, BLOCKS, mapping)
    values = ENCODE(scheme, jnp.asarray(LATENTS), jnp.float32(4.0), num_symbols)
    pack = jax.jit(jax.vmap(lambda v: link.pack_code(v, spending, num_symbols, BLOCKS, mapping)))
    symbol_energy = np.square(np.abs(np.asarray(pack(values)))).sum(2).mean(0)
    counts = symbols_per_block(num_symbols, BLOCKS)
    # One standard deviation of a channel serves 16 places of the raw latent, whose own differ.
    whole = name in ("learned", "klt")
    if whole:
        np.testing.assert_allclose(symbol_energy, counts, rtol=1e-3)
    tolerance = 1e-3 if whole or power == "equal" or name in ("raw", "wiener") else 1e-2
    energy = np.sum(symbol_energy * budget * np.asarray(block_power(spending, power)))
    np.testing.assert_allclose(energy, num_symbols * budget, rtol=tolerance)


def test_all_schemes_see_the_same_gains(schemes):
    keys = realisation_keys(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))
    expected = np.abs(np.asarray(draw_gains(keys, RayleighFading(), BLOCKS))) ** 2
    for name, mapping, num_symbols in (("klt", "ordered", 16), ("learned", "interleaved", 8), ("raw", "ordered", 32)):
        options = {"mapping": mapping, "power": "equal"}
        _, block_snr = send(schemes[name], LATENTS[:4], 6.0, RayleighFading(), num_symbols, **options)
        np.testing.assert_allclose(block_snr, expected * 10**0.6, rtol=1e-5)
    _, loaded = send(schemes["klt"], LATENTS[:4], 6.0, RayleighFading(), 16)
    load = SPEND(schemes["klt"], jnp.float32(6.0), 16, BLOCKS, "ordered").load
    np.testing.assert_allclose(loaded, expected * 10**0.6 * np.asarray(load)[None], rtol=1e-4)


def test_keys_depend_on_image_and_realisation_only():
    key = jax.random.key(3)
    keys = realisation_keys(key, jnp.array([5, 2], jnp.uint32), 1)
    again = realisation_keys(jax.random.clone(key), jnp.array([2], jnp.uint32), 1)
    np.testing.assert_array_equal(jax.random.key_data(keys)[1:], jax.random.key_data(again))
    other = realisation_keys(jax.random.clone(key), jnp.array([2], jnp.uint32), 0)
    assert np.any(jax.random.key_data(other) != jax.random.key_data(again))


@pytest.mark.parametrize(
    ("fading", "mean_error", "num_symbols", "mapping"),
    [
        (RayleighFading(), mean_lmmse_error_rayleigh, 16, "ordered"),
        (RayleighFading(), mean_lmmse_error_rayleigh, 16, "interleaved"),
        (NoFading(), mean_lmmse_error_awgn, 8, "interleaved"),
        (NoFading(), mean_lmmse_error_awgn, 32, "ordered"),
    ],
)
def test_klt_has_its_closed_form(fading, mean_error, num_symbols, mapping):
    scheme, snr_db = KLTScheme(STATISTICS, SHAPE, mean_error), 5.0
    latents = make_latents(2000, seed=1)
    received, _ = send(scheme, latents, snr_db, fading, num_symbols, mapping=mapping)
    load = klt_load(STATISTICS, 2 * num_symbols, db_to_linear(snr_db), mean_error)
    closed = float(klt_nmse(STATISTICS, load, db_to_linear(snr_db), mean_error))
    mean, error = nmse(received, latents)
    # The statistics are those of 4,000 other latents, whose own error is no larger than that of these 2,000.
    assert abs(mean - closed) < FOUR_SIGMA * error


def test_untrained_codec_is_nearly_the_klt(schemes):
    """The codec's loads are those of Rayleigh fading and none together, interpolated over the grid."""
    latents = make_latents(1000, seed=2)
    for snr_db, num_symbols in ((0.0, 32), (8.0, 16)):
        received = [send(schemes[name], latents, snr_db, RayleighFading(), num_symbols)[0] for name in NAMES[:2]]
        codec, klt = (nmse(latent, latents)[0] for latent in received)
        assert 0.97 < codec / klt < 1.1


def test_wiener_is_better_than_symbol_by_symbol(schemes):
    latents = make_latents(500, seed=3)
    for snr_db in (-10.0, 5.0):
        pair = [send(schemes[name], latents, snr_db, RayleighFading(), 32)[0] for name in ("raw", "wiener", "denoiser")]
        errors = [np.square(np.asarray(x) - latents).sum((1, 2, 3)) for x in pair]
        gain = errors[0] - errors[1]
        assert gain.mean() > FOUR_SIGMA * gain.std() / np.sqrt(len(gain))
        # The untrained receiver is the plain one, but for standardising place by place.
        np.testing.assert_allclose(errors[2].mean(), errors[0].mean(), rtol=1e-2)


WEIGHTS = jax.jit(block_weights, static_argnums=(3, 5, 6))


def test_block_weights_of_the_klt(schemes):
    """In closed form: a block loses sum_k v_k snr_k / (1 + snr_k) when it is erased."""
    latents, snr_db = jnp.asarray(make_latents(1000, seed=4)), jnp.float32(5.0)
    for mapping in ("ordered", "interleaved"):
        weights = WEIGHTS(schemes["klt"], jax.random.key(0), latents, 16, snr_db, BLOCKS, mapping)
        spending = SPEND(schemes["klt"], snr_db, 16, BLOCKS, mapping)
        block = link.block_of_value(SIZE, 16, BLOCKS, mapping == "interleaved")
        snr = np.asarray(link.value_snr(spending, db_to_linear(snr_db) * spending.load, block))
        loss = np.asarray(STATISTICS.variances) * snr / (1 + snr)
        expected = np.array([loss[np.asarray(block) == t].sum() for t in range(BLOCKS)])
        np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
        # Four values a block over 1,000 latents: chi-squared with some 2,000 degrees of freedom at worst.
        np.testing.assert_allclose(weights, expected / expected.mean(), rtol=FOUR_SIGMA * np.sqrt(2 / 1000))
        if mapping == "ordered":
            assert np.all(np.diff(weights) < 0)


def test_blocks_that_matter_nothing_have_equal_weights(schemes):
    latents = jnp.asarray(LATENTS[:10])
    weights = WEIGHTS(schemes["raw"], jax.random.key(0), latents, 32, jnp.float32(-300.0), BLOCKS, "ordered")
    np.testing.assert_array_equal(weights, np.ones(BLOCKS))


def test_power_as_given(schemes):
    """A policy's powers take the place of the rules."""
    load = SPEND(schemes["klt"], jnp.float32(6.0), 16, BLOCKS, "ordered").load
    by_rule = send(schemes["klt"], LATENTS[:4], 6.0, RayleighFading(), 16)
    as_given = send(schemes["klt"], LATENTS[:4], 6.0, RayleighFading(), 16, power=load)
    np.testing.assert_allclose(as_given[0], by_rule[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(as_given[1], by_rule[1], rtol=1e-4)


@pytest.mark.parametrize("power", ["codec", "equal"])
def test_additive_model_of_the_klt(schemes, power):
    """The error is a sum over blocks; only the loads inside a block, and what is left of noise, are in the way."""
    latents, snr_db = jnp.asarray(make_latents(200, seed=5)), jnp.float32(5.0)
    weights = WEIGHTS(schemes["klt"], jax.random.key(0), latents, 16, snr_db, BLOCKS, "ordered")
    predict = jax.jit(additive_prediction, static_argnames=("num_symbols", "mapping", "power", "num_realisations"))
    options = {"num_symbols": 16, "power": power, "num_realisations": 100}
    check = predict(schemes["klt"], jax.random.key(1), latents, weights, snr_db, RayleighFading(), **options)
    assert check.measured.shape == check.predicted.shape == (100,)
    correlation = np.corrcoef(check.measured, check.predicted)[0, 1]
    np.testing.assert_allclose(check.r_squared, correlation**2, rtol=1e-4)
    assert 0.9 < check.r_squared <= 1
    np.testing.assert_allclose(check.measured.mean(), check.predicted.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "sorted"}, "mapping is 'sorted'"),
        ({"power": "all"}, "power is 'all'; it must be one of"),
        ({"num_symbols": 33}, "num_symbols is 33"),
        ({"num_symbols": 4}, "num_symbols is 4"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(schemes, name, options, message):
    options = {"num_symbols": 16, **options}
    with pytest.raises(ValueError, match=message):
        send(schemes[name], LATENTS[:2], 0.0, NoFading(), options.pop("num_symbols"), **options)
