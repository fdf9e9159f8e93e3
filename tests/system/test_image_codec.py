"""Coded images: what counts as a byte, outage, the choice at each SNR, the host's codec inside compiled programs."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from megjax.channel import NoFading, RayleighFading
from megjax.system import CodedImageLink, ImageCodecTable, Source, fit_image_codec
from megjax.system.schemes import coded
from megjax.system.schemes.coded import OPTIONS, compress


def smooth_images(num, size=48):
    rng = np.random.default_rng(2)
    return np.stack(
        [
            np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((size, size), Image.BICUBIC))
            for _ in range(num)
        ]
    ).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_compression(codec):
    images = smooth_images(3)
    errors, sizes = [], []
    for quality in [q for name, q in OPTIONS if name == codec][::3]:
        size, decoded = compress(images, codec, quality)
        assert decoded.shape == images.shape and decoded.dtype == size.dtype == np.float32
        errors.append(np.square(decoded - images).mean())
        sizes.append(size.mean())
    assert max(sizes) < 48 * 48 * 3 / 4 and np.all(np.diff(sizes) > 0)
    assert errors[-1] < 2e-3 and errors[-1] < errors[0]
    assert np.square(images - images.mean()).mean() > 3 * errors[0]  # even the coarsest shows the picture


def saved(picture, codec, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.round(255 * picture).astype(np.uint8)).save(buffer, codec, **options)
    return buffer.getvalue()


def test_bytes_that_both_ends_know_do_not_count():
    parts = [
        b"\xff\xd8",
        b"\xff\xe0\x00\x10" + bytes(14),
        b"\xff\xdb\x00\x43" + bytes(65),
        b"\xff\xc4\x00\x05\xff\xda\xff",
        b"\xff\xc4\x00\x03\x00",
        b"\xff\xda\x00\x08" + bytes(6),
        b"\x12\xff\x00\x34",
        b"\xff\xd9",
    ]
    assert coded._jpeg_bytes(b"".join(parts)) == (4, 12)
    picture = smooth_images(1)[0]
    plain = saved(picture, "JPEG", quality=50)
    scan = plain[plain.index(b"\xff\xda") + 2 + 12 : -2]  # the header of a scan of three components has 12 bytes
    assert compress(picture[None], "jpeg", 50)[0][0] == len(scan) + 1 / 8
    webp = saved(picture, "WEBP", quality=50, method=6)
    assert webp[12:16] == b"VP8 " and webp[23:26] == b"\x9d\x01\x2a"  # the start code, after the frame tag
    padding = len(webp) % 2
    size = int.from_bytes(webp[16:20], "little")
    assert len(webp) - 20 - size in (0, 1) and padding == 0
    assert compress(picture[None], "webp", 50)[0][0] == size - 7
    # The first chunk of an extended file says what follows.
    extended = webp[:12] + b"VP8X" + (10).to_bytes(4, "little") + bytes(10) + webp[12:]
    assert coded._webp_bytes(extended) == size - 7


def test_tables_of_its_own_pay_for_a_large_image():
    picture = smooth_images(1, 512)[0]
    own, shared = (coded._jpeg_bytes(saved(picture, "JPEG", quality=20, optimize=o)) for o in (True, False))
    assert sum(own) < shared[0]
    assert compress(picture[None], "jpeg", 20)[0][0] == sum(own) + 1 / 8


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.1, -0.1])
def test_images_outside_of_the_unit_interval(value):
    images = np.full((1, 16, 16, 3), 0.5, np.float32)
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images from smallest to largest is .*; it must be within \[0, 1\]"):
        compress(images, "webp", 50)


def test_the_link_is_out_as_often_as_the_table_says():
    fading, draws, level = RayleighFading(), 4000, 110
    table = coded.outage_table(jax.random.key(0), fading, 4)
    snr_db = coded._GRID_DB[level]
    keys = jax.random.split(jax.random.key(1), draws)
    gains = jax.jit(jax.vmap(lambda key: fading.sample(key, 4)))(keys)
    power, noise_var = jnp.ones(4), jnp.float32(10 ** (-snr_db / 10))
    rates = jnp.asarray(coded._RATES, jnp.float32)
    arrives = jax.jit(jax.vmap(jax.vmap(CodedImageLink.arrives, (None, 0, None, None)), (0, None, None, None)))
    out = 1 - np.asarray(arrives(rates, gains, power, noise_var)).mean(1)
    p = table[level]
    assert np.all(np.abs(out - p) < 5 * np.sqrt(2 * np.maximum(p * (1 - p), 1 / draws) / draws))
    assert np.any((p > 0.1) & (p < 0.9))
    assert np.all(np.diff(table, axis=1) >= 0)


def a_table(rates, choices, shape=(16, 16, 3)):
    levels = jnp.asarray([0.0, 10.0, 20.0])
    mean = jnp.full(shape, 0.25)
    return ImageCodecTable(levels, jnp.asarray(choices, jnp.int32), jnp.asarray(rates, jnp.float32), mean)


def test_symbols_choice_and_outage(make, deliver, source):
    table = a_table([0.5, 0.7, 4.0], [3, 12, 5])
    simulator = make("centralized-coded", fitted=table, fading=NoFading(), policy="equal")
    for snr_db, entry in ((-3.0, 0), (4.9, 0), (5.1, 1), (14.0, 1), (60.0, 2)):
        delivery = deliver(simulator, source, snr_db)
        sizes, decoded = compress(source.images, *OPTIONS[int(table.choice[entry])])
        rate = np.float32(table.rate[entry])
        np.testing.assert_array_equal(delivery.num_symbols, np.ceil(8 * sizes / rate))
        # Without fading log2(1 + snr) decides: 0.58 bits at -3 dB, 3.4 at 10 dB.
        assert np.log2(1 + 10 ** (snr_db / 10)) > rate
        np.testing.assert_array_equal(delivery.images, np.repeat(decoded[:, None], 2, axis=1))
    lost = deliver(simulator, source, -4.0)  # 0.48 bits
    np.testing.assert_array_equal(lost.images, np.full(lost.images.shape, 0.25, np.float32))
    # What does not arrive was sent all the same.
    np.testing.assert_allclose(lost.energy, np.repeat(lost.num_symbols[:, None], 2, axis=1), rtol=1e-6)


def test_fit_keeps_to_the_symbols_and_prefers_quality(images):
    fading, few = RayleighFading(), images[:6]
    for limit in (None, 300.0):
        table = fit_image_codec(jax.random.key(0), few, fading, [0.0, 15.0, 30.0], max_symbols=limit)
        errors = []
        for choice, rate in zip(table.choice, table.rate, strict=True):
            sizes, decoded = compress(few, *OPTIONS[int(choice)])
            assert np.ceil(8 * sizes / float(rate)).mean() <= (384 if limit is None else limit)
            errors.append(np.square(decoded - few).mean())
        assert errors[0] > errors[1] >= errors[2]  # better codecs as the SNR grows
        np.testing.assert_allclose(table.mean_image, few.mean(0), rtol=1e-6)
    # At given energy fewer symbols are more power: with ten times the energy nothing gets worse.
    poor, rich = (fit_image_codec(jax.random.key(0), few, fading, [20.0], energy=energy) for energy in (32.0, 320.0))
    size = [np.mean(compress(few, *OPTIONS[int(t.choice[0])])[0]) for t in (poor, rich)]
    assert size[1] > size[0]


def test_the_codec_runs_in_mapped_programs(images):
    table, values = a_table([0.5, 0.7, 1.0], [3, 12, 5]), jnp.asarray(images[:3])
    source = Source(jnp.zeros((3, 4, 4, 4)), values, jnp.zeros((3, 4, 4, 4)))

    def run(snr_db):
        return CodedImageLink((16, 16, 3)).code(table, source, snr_db, None)

    together = jax.jit(jax.vmap(run))(jnp.asarray([0.0, 12.0]))
    for i, option in enumerate((3, 12)):
        sizes, decoded = compress(values, *OPTIONS[option])
        np.testing.assert_array_equal(together.payload[i], decoded)
        np.testing.assert_array_equal(together.num_symbols[i], np.ceil(8 * sizes / table.rate[i]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"snr_db": [float("nan")]}, "snr_db is .*finite"),
        ({"images": np.zeros((0, 16, 16, 3), np.float32)}, "images' shape is"),
        ({"energy": 0.0}, r"energy is 0\.0.*positive"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"max_symbols": 2.0}, r"max_symbols is 2\.0"),
    ],
)
def test_bad_input(images, options, match):
    given = {"images": images[:2], "snr_db": [0.0]} | options
    with pytest.raises(ValueError, match=match) as error:
        fit_image_codec(jax.random.key(0), fading=NoFading(), **given)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="codec is 'png'"):
        compress(images[:1], "png", 5)
