"""Tests of the analog coders behind their protocol: energy, gains, closed forms, weights of the blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import MAPPINGS, NoFading, RayleighFading, symbols_per_block
from megjax.channel.loading import mean_lmmse_error_awgn
from megjax.channel.theory import mean_lmmse_error_rayleigh
from megjax.codec import SeedCodec, SeedCodecConfig, link
from megjax.codec.coders import Coder, KLTCoder, LearnedCoder, RawCoder
from megjax.codec.fitting import calibrate, initial_network
from megjax.codec.importance import POWERS, additive_prediction, block_power, block_weights
from megjax.codec.linear import klt_load, klt_nmse, latent_statistics
from megjax.system import draw_gains, realisation_keys
from megjax.units import db_to_linear
from tests.checks import STANDARD_ERRORS, within_standard_error
from tests.coders import simulate
from tests.products import inexact_products

SHAPE, SIZE, BLOCKS, COUNT = (4, 4, 4), 64, 8, 1000
NAMES = ("learned", "klt", "raw", "wiener", "denoiser")
CONFIG = SeedCodecConfig(
    latent_shape=SHAPE, tile=SHAPE[:2], width=16, hidden=16, decoder_blocks=1, snr_steps=6, rate_steps=3
)


def make_latents(count, seed=0):
    """Gaussian latents [count 4 4 4] of variances over three decades, in one basis; not centred."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(99)
    basis = np.linalg.qr(same.normal(size=(SIZE, SIZE)))[0]
    values = rng.normal(size=(count, SIZE)) * np.geomspace(3, 0.1, SIZE)
    return (0.5 + values @ basis.T).reshape(count, *SHAPE).astype(np.float32)


LATENTS = make_latents(4 * COUNT)
STATISTICS = latent_statistics(LATENTS)


def learned(**changes):
    """The untrained codec, its code standardised over the latents."""
    network = calibrate(initial_network(dataclasses.replace(CONFIG, **changes), LATENTS), LATENTS)
    codec = SeedCodec(network)
    return LearnedCoder(codec.graph, codec.state)


@pytest.fixture(scope="module")
def schemes(small_programs):
    raw = RawCoder.of(LATENTS)
    return {
        "learned": learned(),
        "klt": KLTCoder(STATISTICS, SHAPE, mean_lmmse_error_rayleigh),
        "raw": raw,
        "wiener": dataclasses.replace(raw, statistics=STATISTICS),
        "denoiser": learned(transform="raw", encoder_blocks=0),
    }


STATIC = ("num_symbols", "num_blocks", "mapping")
SPEND = jax.jit(lambda scheme, *args: scheme.spending(*args), static_argnums=(2, 3, 4))
SIMULATE = jax.jit(simulate, static_argnames=STATIC)
GAINS = jax.jit(draw_gains, static_argnums=2)
PACK = jax.jit(jax.vmap(link.pack_code, (0, None, None, None, None)), static_argnums=(2, 3, 4))


def send(scheme, latents, snr_db, fading, num_symbols, mapping="ordered"):
    """What `simulate` receives; its gains must be those that the keys alone give, whatever the scheme."""
    keys = realisation_keys(jax.random.key(0), np.arange(len(latents), dtype=np.uint32))
    spending = SPEND(scheme, np.float32(snr_db), num_symbols, BLOCKS, mapping)
    options = dict(num_symbols=num_symbols, num_blocks=BLOCKS, mapping=mapping)
    arguments = latents, np.float32(snr_db), fading
    received, block_snr = SIMULATE(scheme, jax.random.clone(keys), *arguments, power=spending.load, **options)
    expected = np.abs(np.asarray(GAINS(keys, fading, BLOCKS))) ** 2 * 10 ** (snr_db / 10) * np.asarray(spending.load)
    np.testing.assert_allclose(block_snr, expected, rtol=1e-4)
    return np.asarray(received)


def nmse(received, latents):
    """Of each latent."""
    return np.square(received - latents).sum((1, 2, 3)) / float(STATISTICS.total_variance)


@pytest.mark.parametrize("name", NAMES)
def test_protocol(schemes, name):
    scheme = schemes[name]
    assert isinstance(scheme, Coder)
    leaves, structure = jax.tree.flatten(scheme)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure

    @jax.jit
    def perfect_link(scheme, latents):
        values = scheme.encode(latents, 3.0, SIZE // 2)
        return values, scheme.decode(link.Received(values, jnp.full(values.shape, 1e9)), 3.0, SIZE // 2)

    values, decoded = perfect_link(scheme, LATENTS[:3])
    assert values.shape == (3, SIZE) and values.dtype == jnp.float32
    # A perfect link of full rate: nothing is lost but rounding, magnified by the whitening's condition of 30.
    np.testing.assert_allclose(decoded, LATENTS[:3], atol=1e-3)


@pytest.fixture(scope="module")
def standard_values(schemes):
    """Values of a scheme by name, over the latents that its statistics are of."""
    encode = jax.jit(lambda scheme, latents, num_symbols: scheme.encode(latents, 4.0, num_symbols), static_argnums=2)
    return functools.cache(lambda name, num_symbols: encode(schemes[name], LATENTS, num_symbols))


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_radiated_energy_is_the_budget(schemes, standard_values, name, mapping):
    """Over latents whose values are standardised exactly, by either rule of the powers."""
    scheme, budget = schemes[name], 2.5
    num_symbols = SIZE // 2 if name in ("raw", "wiener", "denoiser") else 16
    spending = SPEND(scheme, np.float32(4.0), num_symbols, BLOCKS, mapping)
    assert spending.load.shape == (BLOCKS,) and spending.shape.shape == (SIZE,)
    np.testing.assert_allclose(np.mean(spending.load), 1, rtol=1e-5)
    assert np.all(np.asarray(spending.shape)[2 * num_symbols :] == 0)
    symbols = PACK(standard_values(name, num_symbols), spending, num_symbols, BLOCKS, mapping)
    symbol_energy = np.square(np.abs(np.asarray(symbols))).sum(2).mean(0)
    counts = symbols_per_block(num_symbols, BLOCKS)
    # One standard deviation of a channel serves 16 places of the raw latent, whose own differ.
    whole = name in ("learned", "klt")
    if whole:
        np.testing.assert_allclose(symbol_energy, counts, rtol=1e-3)
    for power in POWERS:
        tolerance = 1e-3 if whole or power == "equal" or name in ("raw", "wiener") else 1e-2
        energy = np.sum(symbol_energy * budget * np.asarray(block_power(spending, power)))
        np.testing.assert_allclose(energy, num_symbols * budget, rtol=tolerance)


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
        pytest.param(RayleighFading(), mean_lmmse_error_rayleigh, 16, "interleaved", marks=pytest.mark.slow),
        pytest.param(NoFading(), mean_lmmse_error_awgn, 8, "interleaved", marks=pytest.mark.slow),
        pytest.param(NoFading(), mean_lmmse_error_awgn, 32, "ordered", marks=pytest.mark.slow),
    ],
)
def test_klt_has_its_closed_form(fading, mean_error, num_symbols, mapping):
    scheme, snr_db = KLTCoder(STATISTICS, SHAPE, mean_error), 5.0
    latents = make_latents(COUNT, seed=1)

    @jax.jit
    def closed(snr):
        return klt_nmse(STATISTICS, klt_load(STATISTICS, 2 * num_symbols, snr, mean_error), snr, mean_error)

    received = send(scheme, latents, snr_db, fading, num_symbols, mapping)
    # The statistics are those of 4,000 other latents, whose own error is no larger than that of these.
    within_standard_error(nmse(received, latents), closed(db_to_linear(snr_db)))


def test_untrained_codec_is_nearly_the_klt(schemes):
    """The codec's loads are those of Rayleigh fading and none together, interpolated over the grid."""
    latents = make_latents(COUNT, seed=2)
    for snr_db in (0.0, 8.0):
        codec, klt = (nmse(send(schemes[name], latents, snr_db, RayleighFading(), 16), latents) for name in NAMES[:2])
        assert 0.97 < codec.mean() / klt.mean() < 1.1


@pytest.mark.slow
def test_wiener_is_better_than_symbol_by_symbol(schemes):
    latents = make_latents(500, seed=3)
    for snr_db in (-10.0, 5.0):
        raw, wiener, denoiser = (
            nmse(send(schemes[name], latents, snr_db, RayleighFading(), 32), latents)
            for name in ("raw", "wiener", "denoiser")
        )
        gain = raw - wiener
        assert gain.mean() > STANDARD_ERRORS * gain.std() / np.sqrt(len(gain))
        # The untrained receiver is the plain one, but for standardising place by place.
        np.testing.assert_allclose(denoiser.mean(), raw.mean(), rtol=1e-2)


@pytest.mark.slow
def test_power_by_rule(schemes):
    """What `send` gives as an array, and works out beforehand, is what the scheme wants."""
    latents = make_latents(COUNT, seed=2)
    keys = realisation_keys(jax.random.key(0), np.arange(COUNT, dtype=np.uint32))
    by_rule = jax.jit(simulate, static_argnames=(*STATIC, "power"))
    options = dict(num_symbols=16, num_blocks=BLOCKS)
    received, _ = by_rule(schemes["learned"], keys, latents, np.float32(8.0), RayleighFading(), **options)
    expected = send(schemes["learned"], latents, 8.0, RayleighFading(), 16)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def measure_weights():
    return jax.jit(block_weights, static_argnums=(3, 5, 6))


@pytest.fixture(scope="module")
def klt_weights(schemes, measure_weights):
    """Weights of the KLT's blocks at 5 dB and 16 symbols, by mapping."""
    arguments = schemes["klt"], jax.random.key(0), make_latents(COUNT, seed=4), 16, np.float32(5.0), BLOCKS
    return functools.cache(lambda mapping: np.asarray(measure_weights(*arguments, mapping)))


@pytest.mark.parametrize("mapping", ["ordered", pytest.param("interleaved", marks=pytest.mark.slow)])
def test_block_weights_of_the_klt(schemes, klt_weights, mapping):
    """In closed form: a block loses sum_k v_k snr_k / (1 + snr_k) when it is erased."""
    weights, spending = klt_weights(mapping), SPEND(schemes["klt"], np.float32(5.0), 16, BLOCKS, mapping)
    block = np.asarray(link.block_of_value(SIZE, 16, BLOCKS, mapping == "interleaved"))
    snr = np.asarray(spending.shape) * (10**0.5 * np.asarray(spending.load))[block]
    loss = np.asarray(STATISTICS.variances) * snr / (1 + snr)
    expected = np.array([loss[block == t].sum() for t in range(BLOCKS)])
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
    # Four values a block over the latents: chi-squared with some 2,000 degrees of freedom at worst.
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=STANDARD_ERRORS * np.sqrt(2 / COUNT))
    if mapping == "ordered":
        assert np.all(np.diff(weights) < 0)


def test_blocks_that_matter_nothing_have_equal_weights(schemes, measure_weights):
    arguments = LATENTS[:10], 32, np.float32(-300.0), BLOCKS, "ordered"
    weights = measure_weights(schemes["raw"], jax.random.key(0), *arguments)
    np.testing.assert_array_equal(weights, np.ones(BLOCKS))


@pytest.mark.slow
def test_additive_model_of_the_klt(schemes, klt_weights):
    """The error is a sum over blocks; only the loads inside a block, and what is left of noise, are in the way."""
    latents, snr_db = make_latents(200, seed=5), np.float32(5.0)
    load = SPEND(schemes["klt"], snr_db, 16, BLOCKS, "ordered").load
    predict = jax.jit(additive_prediction, static_argnames=("num_symbols", "num_realisations"))
    arguments = latents, klt_weights("ordered"), snr_db, RayleighFading()
    for power in (load, np.ones(BLOCKS, np.float32)):
        options = dict(num_symbols=16, power=power, num_realisations=100)
        check = predict(schemes["klt"], jax.random.key(1), *arguments, **options)
        assert check.measured.shape == check.predicted.shape == (100,)
        correlation = np.corrcoef(check.measured, check.predicted)[0, 1]
        np.testing.assert_allclose(check.r_squared, correlation**2, rtol=1e-4)
        assert 0.9 < check.r_squared <= 1
        np.testing.assert_allclose(np.mean(check.measured), np.mean(check.predicted), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "sorted"}, "mapping is 'sorted'"),
        ({"power": "all"}, "power is 'all'; it must be one of"),
        ({"num_symbols": 33}, "num_symbols is 33"),
        ({"num_symbols": 4}, "num_symbols=4"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(schemes, name, options, message):
    keys = jax.random.split(jax.random.key(0), 2)
    call = functools.partial(simulate, **dict(num_symbols=16, num_blocks=BLOCKS) | options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, schemes[name], keys, LATENTS[:2], 0.0, NoFading())


@pytest.mark.parametrize("name", NAMES)
def test_products_outside_the_networks_are_exact(schemes, name):
    def both_ways(scheme, latents, snr_db):
        keys = realisation_keys(jax.random.key(0), np.arange(len(latents), dtype=np.uint32))
        return simulate(scheme, keys, latents, snr_db, RayleighFading(), num_symbols=16)

    assert inexact_products(both_ways, schemes[name], LATENTS[:2], 5.0) == []
