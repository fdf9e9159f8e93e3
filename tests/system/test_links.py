"""Links by themselves: closed forms of analog reception, symbols' power, bits on QAM, spreading over blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import modulate, theory
from megjax.channel.packing import from_blocks, to_blocks
from megjax.codec import SeedCodec, link
from megjax.codec.coders import RawCoder
from megjax.system import (
    AnalogLink,
    CodedImageLink,
    QAMLink,
    Source,
    SourceStatistics,
    SplitConstants,
    SplitLink,
    find_scheme,
    latent_moments,
)
from megjax.system.schemes.qam import _from_bits, _scrambling, _to_bits
from megjax.system.schemes.split import despread, spread
from tests.checks import within_standard_error

MEAN, STD = jnp.asarray([0.5, -0.2, 0.0, 0.1]), jnp.asarray([1.2, 0.8, 1.0, 0.9])
BLOCKS = 16


def white_latents(num):
    noise = np.random.default_rng(2).standard_normal((num, 4, 4, 4))
    return jnp.asarray(np.asarray(MEAN) + np.asarray(STD) * noise, jnp.float32)


def only_latents(latents):
    return Source(latents, jnp.zeros((len(latents), 16, 16, 3)), latents)


@functools.partial(jax.jit, static_argnames="way")
def run(way, params, source, gains, snr_db):
    code = way.code(params, source, snr_db, None)

    def one(key, payload, gains):
        return way.transmit(params, key, payload, code.shared, gains, code.load, 10 ** (-snr_db / 10))

    keys = jax.random.split(jax.random.key(3), gains.shape[:2])
    return jax.vmap(jax.vmap(one, (0, None, 0)))(keys, code.payload, gains), code.shared


def receive(way, params, source, gains, snr_db):
    """What the link's receiver has of every image [b] from draws of gains [b r t] and noise, and what it knows."""
    return run(way, params, source, gains, jnp.float32(snr_db))


@functools.partial(jax.jit, static_argnames="way")
def decode(way, params, received, shared):
    """What the link makes of receptions [b r ...]: images or latents [b r ...]."""
    size = jax.tree.leaves(received)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), received)
    found = way.decode(params, flat, shared)
    return found.reshape(*size, *found.shape[1:])


def drawn_gains(fading, num, draws):
    """Gains [n r t] of every block, of Rayleigh fading or none."""
    size = (num, draws, BLOCKS)
    if not fading:
        return jnp.ones(size, jnp.complex64)
    rng = np.random.default_rng(4)
    gains = np.sqrt(0.5) * (rng.standard_normal(size) + 1j * rng.standard_normal(size))
    return jnp.asarray(gains, jnp.complex64)


def test_symbol_counts():
    counts = {
        "seed": 32,
        "seed-klt": 32,
        "seed-digital": 32,
        "opta": 32,
        "latent": 128,
        "latent-denoiser": 128,
        "latent-wiener": 128,
        "centralized": 3 * 64 * 64 // 2,
        "centralized-coded": None,
        "centralized-qam": 8 * 64 * 64 * 3 // 4,
        "split": 128,
        "split-seed": 32,
        "prompt": 0,
    }
    for name, count in counts.items():
        assert find_scheme(name).num_symbols((64, 64, 3), (8, 8, 4)) == count, name
    assert QAMLink((64, 64, 3)).num_symbols == 8 * 64 * 64 * 3 // 4
    assert QAMLink((4, 4, 3), "64qam").num_symbols == 64  # 384 bits
    assert QAMLink((4, 5, 3), "1024qam").num_symbols == 48
    assert SplitLink((3, 3, 3), num_blocks=4).num_symbols == 14


@pytest.mark.parametrize(
    ("fading", "snr_db", "expected"),
    [
        (False, -5.0, 1 / (1 + 10**-0.5)),
        (False, 5.0, 1 / (1 + 10**0.5)),
        (True, 0.0, 0.596347),  # E[1 / (1 + g)] for g ~ Exp(1) is e E1(1)
    ],
)
def test_analog_error_is_that_of_the_lmmse_receiver(fading, snr_db, expected):
    way, latents = AnalogLink(32, BLOCKS, "interleaved"), white_latents(800)
    scheme = RawCoder(MEAN, STD, (4, 4, 4))
    received, shared = receive(way, scheme, only_latents(latents), drawn_gains(fading, 800, 2), snr_db)
    error = (np.asarray(decode(way, scheme, received, shared)) - np.asarray(latents)[:, None]) / np.asarray(STD)
    within_standard_error(np.square(error).mean((1, 2, 3, 4)), expected)


def powers(symbols):
    """Mean power [n t] of every block's symbols."""
    return np.square(np.abs(np.asarray(symbols))).mean(-1)


@pytest.mark.parametrize("scheme", ["seed", "seed-klt", "latent"])
def test_analog_symbols_have_unit_power_in_every_block(make, latents, scheme):
    simulator = make(scheme)

    def pack(arguments, values):
        return link.pack_code(values, *arguments)

    @jax.jit
    def symbols(params, source):
        found = {}
        for mapping in ("ordered", "interleaved"):
            way = dataclasses.replace(simulator.link, mapping=mapping)
            code = way.code(params, source, jnp.float32(3.0), None)
            arguments = code.shared[0], way.num_symbols, BLOCKS, mapping
            found[mapping] = jax.vmap(functools.partial(pack, arguments))(code.payload)
        return found

    for found in symbols(simulator.params["codec"], only_latents(jnp.asarray(latents))).values():
        within_standard_error(powers(found), 1.0, axis=0)


def test_pixels_have_unit_power(make, images):
    simulator = make("centralized")
    moments = jnp.asarray(images.mean((0, 1, 2))), jnp.asarray(images.std((0, 1, 2)))
    scheme = RawCoder(*moments, simulator.params["codec"].latent_shape)
    latents = jnp.zeros((len(images), 4, 4, 4))
    code = jax.jit(simulator.link.code, static_argnums=3)(
        scheme, Source(latents, jnp.asarray(images), latents), jnp.float32(3.0), None
    )
    assert code.payload.shape == (40, 768)
    assert abs(float(jnp.square(code.payload).mean()) - 1) < 1e-4


@pytest.mark.parametrize("modulation", ["16qam", "64qam"])
def test_bits_on_qam_have_unit_power_in_every_block(images, modulation):
    way = QAMLink((16, 16, 3), modulation, BLOCKS)
    latents = jnp.zeros((len(images), 4, 4, 4))

    @jax.jit
    def symbols(source):
        blocks = jax.vmap(lambda bits: to_blocks(modulate(bits, modulation), BLOCKS))(
            way.code((), source, 0.0, None).payload
        )
        plain = jax.vmap(lambda image: modulate(_to_bits(image, 6144), modulation))(source.images)
        return blocks, plain

    blocks, plain = symbols(Source(latents, jnp.asarray(images), latents))
    # All images share the scrambling, so it is the symbols of a block that are independent.
    within_standard_error(np.square(np.abs(blocks)).mean(0), 1.0, axis=1)
    assert abs(np.square(np.abs(plain)).mean() - 1) > 0.05  # without scrambling


def test_layout_of_the_bits():
    image = jnp.asarray([1, 130, 255]).reshape(1, 1, 3) / 255
    bits = np.asarray(jax.jit(_to_bits, static_argnums=1)(image, 28)).astype(int)
    assert "".join(map(str, bits)) == "0000000110000010111111110000"
    np.testing.assert_allclose(jax.jit(_from_bits, static_argnums=1)(bits == 1, (1, 1, 3)), image, rtol=1e-6)
    assert np.array_equal(_scrambling(8), _scrambling(16)[:8])


@pytest.mark.parametrize("modulation", ["qpsk", "16qam", "256qam", "1024qam"])
def test_eight_bits_come_back_without_noise(modulation):
    levels = np.arange(768).reshape(1, 16, 16, 3) % 256
    images = jnp.asarray(levels / 255, jnp.float32)
    way, latents = QAMLink((16, 16, 3), modulation, BLOCKS), jnp.zeros((1, 4, 4, 4))
    gains = drawn_gains(True, 1, 2)
    received, _ = receive(way, (), Source(latents, images, latents), gains, 90.0)
    decoded = decode(way, (), received, ())[0]
    assert np.array_equal(np.round(255 * np.asarray(decoded)), np.broadcast_to(levels, decoded.shape))


def test_bit_errors_are_those_of_the_modulation(images):
    way, source = QAMLink((16, 16, 3), "16qam", BLOCKS), Source(None, jnp.asarray(images), None)
    source = source._replace(latents=jnp.zeros((len(images), 4, 4, 4)))
    sent = np.asarray(jax.jit(lambda source: way.code((), source, 0.0, None).payload)(source))
    for snr_db in (8.0, 30.0):
        received, _ = receive(way, (), source, drawn_gains(False, len(images), 2), snr_db)
        wrong = (np.asarray(received) != sent[:, None]).mean((1, 2))
        expected = float(theory.ber_awgn(10 ** (snr_db / 10), "16qam"))
        if snr_db == 8.0:
            within_standard_error(wrong, expected)
        else:
            assert wrong.max() == 0 and expected < 1e-9


def test_symbols_are_dealt_to_the_blocks_in_turn():
    symbols = jnp.asarray(np.arange(7) * (1 - 1j), jnp.complex64)
    blocks = jax.jit(to_blocks, static_argnums=1)(symbols, 3)
    np.testing.assert_allclose(blocks.real, [[0, 3, 6], [1, 4, 0], [2, 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(from_blocks, static_argnums=1)(blocks, 7), symbols, rtol=1e-6)


@pytest.mark.parametrize("num_values", [64, 27])
def test_spreading_is_unitary(num_values):
    num, rng = -(-num_values // 2), np.random.default_rng(0)
    values, signs = (jnp.asarray(x, jnp.float32) for x in (rng.normal(size=num_values), rng.choice([-1, 1], num)))

    @jax.jit
    def there_and_back(values, signs):
        symbols = spread(values, signs)
        return symbols, despread(symbols, signs, num_values)

    symbols, back = there_and_back(values, signs)
    assert symbols.shape == (num,) and symbols.dtype == jnp.complex64
    np.testing.assert_allclose(back, values, atol=1e-5)
    np.testing.assert_allclose(np.square(np.abs(symbols)).sum(), np.square(values).sum() / 2, rtol=1e-5)


def test_spread_symbols_have_unit_power_in_every_block(latents):
    """However the latents are correlated, as each transmission has signs of its own."""
    values = np.asarray(latents).reshape(len(latents), -1)
    values = values - values.mean(0)
    values = jnp.asarray(values / values.std())

    def one(key, v):
        return to_blocks(spread(v, jax.random.rademacher(key, (32,), jnp.float32)), BLOCKS)

    symbols = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), len(values)), values)
    within_standard_error(powers(symbols), 1.0, axis=0)


def test_bundled_latents_have_unit_power_when_spread():
    """Latents of scenes have a few strong components: with the same signs for all, blocks differ by tens of percent."""
    codec = SeedCodec.from_pretrained("scenes")
    mean, std = latent_moments(codec, SourceStatistics())
    values = (jnp.asarray(codec.validation) - mean[None, None, None]) / np.sqrt(np.mean(np.square(std)))
    values = jnp.repeat(values.reshape(len(values), -1), 8, axis=0)

    def one(key, v):
        return to_blocks(spread(v, jax.random.rademacher(key, (128,), jnp.float32)), BLOCKS)

    found = powers(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), len(values)), values))
    within_standard_error(found.reshape(-1, 8, BLOCKS).mean(1), 1.0, axis=0)


@pytest.mark.parametrize("level", [1.0, 0.6])
@pytest.mark.parametrize(("fading", "variance"), [(False, 0.5), (True, 1.7), (True, 1.0)])
def test_the_devices_input_has_the_law_of_a_noisy_latent(fading, variance, level):
    """Mean sqrt(a') z0 and variance 1 - a', as q(z_t | z_0) has them, given the gains and the clean latent."""
    snr_db, num = 5.0, 1500
    gains = np.asarray(drawn_gains(fading, 1, 1))[0, 0]
    noise = np.random.default_rng(6).standard_normal((2, num, 4, 4, 4)).astype(np.float32)
    centred = np.float32(np.sqrt(variance)) * noise[0]
    clean = np.asarray(MEAN) + centred
    partial = np.float32(np.sqrt(level)) * clean + np.float32(np.sqrt(1 - level)) * noise[1]
    way, params = SplitLink((4, 4, 4), 1, level, BLOCKS), SplitConstants(MEAN, jnp.float32(variance))
    source = Source(jnp.asarray(clean), None, jnp.asarray(partial))
    found, _ = receive(way, params, source, jnp.asarray(np.broadcast_to(gains, (num, 1, BLOCKS))), snr_db)
    alpha_bar = np.asarray(found.alpha_bar)
    snr = 1 / np.mean(1 / (1 + np.square(np.abs(gains)) * 10 ** (snr_db / 10))) - 1
    sent_variance = level * variance + 1 - level
    np.testing.assert_allclose(alpha_bar, level / (1 + sent_variance / snr), rtol=1e-4)
    if variance == 1:
        np.testing.assert_allclose(alpha_bar, level * snr / (1 + snr), rtol=1e-4)
    residual = np.asarray(found.latents[:, 0]) - np.sqrt(alpha_bar[0, 0]) * clean
    within_standard_error(residual.mean((1, 2)), 0.0, axis=0)  # by channel
    within_standard_error(np.square(residual).mean((1, 2, 3)), 1 - alpha_bar[0, 0])
    within_standard_error((residual * centred).mean((1, 2, 3)), 0.0)


@pytest.mark.parametrize(
    ("construct", "match"),
    [
        (lambda: AnalogLink(8, 4, "random"), "mapping is 'random'.*ordered"),
        (lambda: AnalogLink(8, 4, content="noisy"), "content is 'noisy'.*images"),
        (lambda: AnalogLink(3, 4), "num_blocks is 4.*num_symbols=3"),
        (lambda: AnalogLink(3, 0), "num_blocks is 0"),
        (lambda: QAMLink((4, 4, 3), "8psk"), "modulation is '8psk'.*16qam"),
        (lambda: QAMLink((1, 1, 3), "16qam", 16), "num_blocks is 16"),
        (lambda: SplitLink((4, 4, 4), 0), "device_steps is 0.*integer"),
        (lambda: SplitLink((4, 4, 4), 1, 0.0), r"level is 0\.0.*\(0, 1\]"),
        (lambda: SplitLink((4, 4, 4), 1, 1.5), r"level is 1\.5"),
        (lambda: SplitLink((2, 2, 4), num_blocks=16), "num_blocks is 16.*num_symbols=8"),
        (lambda: CodedImageLink((4, 4, 3), 0), "num_blocks is 0"),
        (lambda: find_scheme("seed:rate=0.5").num_symbols((64, 64, 3), (8, 8, 4)), r"rate is 0\.5"),
        (lambda: find_scheme("pigeon"), "scheme is 'pigeon'"),
    ],
)
def test_bad_input(construct, match):
    with pytest.raises(ValueError, match=match) as error:
        construct()
    assert "\n" not in str(error.value)
