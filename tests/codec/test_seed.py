"""Tests of SeedCodec: shapes, the energy that it radiates, one trace a shape, its files and its error messages."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from megjax.channel import radiated_energy, symbols_per_block
from megjax.codec import SeedCodec, link, seed

EPS = 2.0**-24
WEIGHTS = "model.safetensors"
# The statistics are sums of 1000 float32 terms at a time, whose rounding is at most this.
MOMENT_ERROR = 1000 * EPS


# (symbols, blocks, mapping)
UNEQUAL = [
    (19, 16, "interleaved"),
    (19, 16, "ordered"),
    pytest.param(1, 1, "interleaved", marks=pytest.mark.slow),
]
FULL = [(24, 16, "ordered"), (24, 4, "interleaved")]


def receive(codec, symbols, num_symbols, snr_db, mapping, block_snr):
    """Latents after a link without noise whose receiver counts on `block_snr`, and so shrinks by its LMMSE factor."""
    snr = np.full(symbols.shape[:2], block_snr, np.float32)
    return codec.decode(np.float32(block_snr / (1 + block_snr)) * symbols, snr, num_symbols, snr_db, mapping)


@pytest.mark.parametrize(("num_symbols", "num_blocks", "mapping"), UNEQUAL + FULL)
def test_radiated_energy(stirred_codec, latents, num_symbols, num_blocks, mapping):
    """Over the data of the calibration every block radiates as many units of energy as it has symbols, at any SNR."""
    counts = symbols_per_block(num_symbols, num_blocks)
    for snr_db in (-40.0, 0.0, 12.3, 21.0):
        symbols, load = stirred_codec.encode(latents, num_symbols, snr_db, num_blocks, mapping)
        assert symbols.shape == (len(latents), num_blocks, counts[0]) and symbols.dtype == jnp.complex64
        energy = np.square(np.abs(np.asarray(symbols, np.complex128))).sum(2).mean(0)
        np.testing.assert_allclose(energy, counts, rtol=2 * MOMENT_ERROR)
        # No energy hides in the symbols, and the loads share out P: K P in all when blocks are equally long.
        assert load.shape == (num_blocks,) and np.all(np.asarray(load) > 0)
        np.testing.assert_allclose(np.mean(load), 1, rtol=num_blocks * EPS)
        power = 1.7 * load
        total = float((np.asarray(power) * energy).sum())
        np.testing.assert_allclose(total, radiated_energy(power, num_symbols, num_blocks), rtol=3 * MOMENT_ERROR)
        if num_symbols % num_blocks == 0:
            np.testing.assert_allclose(total, 1.7 * num_symbols, rtol=3 * MOMENT_ERROR)


def test_the_load_depends_on_snr_rate_and_mapping_only(stirred_codec, latents):
    def load(batch, *arguments):
        return np.asarray(stirred_codec.encode(batch, *arguments)[1])

    reference = load(latents, 19, 12.3, 16, "ordered")
    np.testing.assert_array_equal(load(5 - 9 * latents, 19, 12.3, 16, "ordered"), reference)
    for arguments in ((19, 6.0, 16, "ordered"), (24, 12.3, 16, "ordered"), (19, 12.3, 16, "interleaved")):
        assert np.abs(load(latents, *arguments) - reference).max() > 1e-3


@pytest.mark.parametrize(("num_symbols", "num_blocks", "mapping"), FULL)
def test_the_start_brings_latents_back_without_noise(codec, latents, num_symbols, num_blocks, mapping):
    symbols = np.asarray(codec.encode(latents, num_symbols, 20.0, num_blocks, mapping)[0])
    decoded = receive(codec, symbols, num_symbols, 20.0, mapping, 1e12)
    assert decoded.shape == latents.shape and decoded.dtype == jnp.float32
    # Rounding of float32 in sums of 48 terms of this size; the packing divides by the smallest shape's root, 1e-2.
    np.testing.assert_allclose(decoded, latents, atol=48 * 8 * EPS * np.abs(latents).max())


@pytest.fixture(scope="module")
def through_values(stirred):
    """What the network makes of the values' estimates at an SNR of the blocks, the link being left out."""

    @functools.partial(jax.jit, static_argnames="num_blocks")
    def trip(batch, snr_db, block_snr, num_symbols, interleaved, num_blocks):
        network = nnx.merge(stirred.graph, stirred.state)
        values = network.encode(batch, snr_db, num_symbols)
        block = link.block_of_value(values.shape[1], num_symbols, num_blocks, interleaved)
        shape = link.split_load(network.spend(snr_db, num_symbols), num_symbols, block, num_blocks).shape
        value_snr = jnp.broadcast_to((shape * block_snr)[None], values.shape)
        condition = jnp.full(len(batch), snr_db), jnp.full(len(batch), num_symbols)
        return network.decode(value_snr / (1 + value_snr) * values, value_snr, *condition)

    return trip


@pytest.mark.parametrize(("num_symbols", "num_blocks", "mapping"), UNEQUAL)
def test_blocks_of_unequal_length(stirred_codec, through_values, latents, num_symbols, num_blocks, mapping):
    """Through symbols and back is what the network makes of the values' estimates; empty slots are not read."""
    snr_db, block_snr = 7.0, 5.0
    symbols = np.asarray(stirred_codec.encode(latents, num_symbols, snr_db, num_blocks, mapping)[0])
    counts = symbols_per_block(num_symbols, num_blocks)
    filled = np.arange(counts[0])[None] < counts[:, None]
    np.testing.assert_array_equal(symbols[:, ~filled], 0)
    decoded = receive(stirred_codec, symbols, num_symbols, snr_db, mapping, block_snr)
    dirty = np.where(filled[None], symbols, np.complex64(9.0))
    np.testing.assert_array_equal(receive(stirred_codec, dirty, num_symbols, snr_db, mapping, block_snr), decoded)
    expected = through_values(latents, snr_db, block_snr, num_symbols, mapping == "interleaved", num_blocks)
    # A network of width 16 on inputs of order 1 to 10.
    np.testing.assert_allclose(decoded, expected, atol=200 * EPS * np.abs(decoded).max())


def test_rates(codec):
    assert [codec.num_symbols(rate) for rate in (1.0, 2.0, 4.0, 8.0)] == [24, 12, 6, 3]
    assert codec.latent_shape == (6, 4, 2)
    with pytest.raises(ValueError, match="^rate is 0.5"):
        codec.num_symbols(0.5)


def test_same_shapes_are_traced_once(monkeypatch, plain, latents):
    for name in ("encode", "decode"):
        monkeypatch.setattr(seed, name, chex.assert_max_traces(getattr(seed, name), n=1))
    codec = SeedCodec(nnx.merge(plain.graph, plain.state))
    for snr_db, part in ((0.0, latents[:2]), (7, latents[2:4]), (np.float32(-3.5), latents[4:6])):
        symbols, _ = codec.encode(part, 6, float(snr_db), 4)
        codec.decode(symbols, np.full((2, 4), 2.0, np.float32), 6, float(snr_db))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        codec.encode(latents[:2], 7, 0.0, 4)


@pytest.fixture
def folder(stirred_codec, tmp_path):
    stirred_codec.save_pretrained(tmp_path)
    return tmp_path


def test_files_round_trip(folder, stirred_codec):
    loaded = SeedCodec.from_pretrained(folder)
    assert loaded.config == stirred_codec.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    pairs = zip(nnx.to_flat_state(stirred_codec.state), nnx.to_flat_state(loaded.state), strict=True)
    stored = load_file(folder / WEIGHTS)
    for (path, before), (again, after) in pairs:
        trained = isinstance(before, nnx.Param)
        expected = np.asarray(before[...])
        assert path == again and after[...].dtype == jnp.float32
        assert stored[".".join(map(str, path))].dtype == (np.float16 if trained else np.float32)
        np.testing.assert_array_equal(after[...], expected.astype(np.float16) if trained else expected)
    # In full precision nothing changes; `str` and `Path` both name a folder.
    stirred_codec.save_pretrained(str(folder / "whole"), np.float32)
    chex.assert_trees_all_equal(SeedCodec.from_pretrained(str(folder / "whole")).state, stirred_codec.state)


def test_activations_in_another_dtype(folder, stirred_codec, latents):
    loaded = SeedCodec.from_pretrained(folder, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded.state))
    arguments = latents, 24, 3.0, 4, "interleaved"
    symbols, load = loaded.encode(*arguments)
    symbols, reference = np.asarray(symbols), np.asarray(stirred_codec.encode(*arguments)[0])
    assert symbols.dtype == jnp.complex64 and load.dtype == jnp.float32
    # bfloat16 has eight bits; a rounding in each of five layers.
    assert 0 < np.abs(symbols - reference).max() < 5 * 2.0**-8 * np.abs(reference).max()


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_tensors_that_do_not_fit_are_all_listed(folder):
    def spoil(tensors):
        del tensors["scale"]
        tensors["foreign"] = np.zeros(3, np.float32)
        tensors["load_logits"] = tensors["load_logits"][:2]
        tensors["latent_mean"] = np.full_like(tensors["latent_mean"], np.nan)

    edit(folder, spoil)
    with pytest.raises(ValueError, match="does not fit its configuration") as error:
        SeedCodec.from_pretrained(folder)
    for problem in (
        "missing scale",
        "extra foreign",
        r"load_logits has shape (2, 3, 48), expected (3, 3, 48)",
        "latent_mean has values that are not finite",
    ):
        assert problem in str(error.value)


def test_damaged_weights(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a whole safetensors file"):
        SeedCodec.from_pretrained(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / WEIGHTS).rename(folder / "model.bin")
    with pytest.raises(ValueError, match=WEIGHTS):
        SeedCodec.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown setting 'colour' = 'red'"),
        ({"width": 0}, "codec: width is 0"),
        ({"tile": [4, 4]}, "codec: tile is "),
        ({"width": 17}, "does not fit its configuration: .* expected "),
    ],
)
def test_configurations_that_do_not_fit(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        SeedCodec.from_pretrained(folder)


def test_missing_folders(folder):
    with pytest.raises(ValueError, match="^codec is '/no/such/folder'; it must be one of .*scenes"):
        SeedCodec.from_pretrained("/no/such/folder")
    with pytest.raises(ValueError, match="^codec is 'sceness'"):
        SeedCodec.from_pretrained("sceness")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json does not exist"):
        SeedCodec.from_pretrained(folder)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("^latents' shape is .*; it must be .*6, 4, 2", dict(latents=np.zeros((2, 4, 6, 2), np.float32))),
        ("^latents' shape is ", dict(latents=np.zeros((6, 4, 2), np.float32))),
        ("^num_symbols is 25;.* from 4 .* to 24", dict(num_symbols=25)),
        ("^num_symbols is 3;", dict(num_symbols=3)),
        ("^num_symbols is 6.0;", dict(num_symbols=6.0)),
        ("^num_symbols is True;", dict(num_symbols=True, num_blocks=1)),
        ("^num_blocks is 0;", dict(num_blocks=0)),
        ("^mapping is 'spiral';", dict(mapping="spiral")),
        ("^snr_db is nan;", dict(snr_db=float("nan"))),
        ("^snr_db is inf;", dict(snr_db=float("inf"))),
        ("^snr_db is .*one number", dict(snr_db=[0.0, 1.0])),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_encode_refuses(codec, latents, message, arguments):
    usual = dict(latents=latents[:2], num_symbols=6, snr_db=0.0, num_blocks=4, mapping="ordered")
    with pytest.raises(ValueError, match=message):
        codec.encode(**usual | arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("^symbols' shape is .*b t k", dict(symbols=np.zeros((4, 2), np.complex64))),
        (r"^symbols' shape is .*\(2, 4, 2\) for 6 symbols", dict(symbols=np.zeros((2, 4, 3), np.complex64))),
        ("^num_symbols is 6;", dict(symbols=np.zeros((2, 8, 1), np.complex64))),
        ("^num_symbols is 25;", dict(num_symbols=25)),
        (r"^block_snr's shape is .*\(2, 4\)", dict(block_snr=np.ones((2, 5), np.float32))),
        ("^block_snr's shape is ", dict(block_snr=np.ones(4, np.float32))),
        ("^mapping is 'spiral';", dict(mapping="spiral")),
        ("^snr_db is nan;", dict(snr_db=float("nan"))),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_decode_refuses(codec, message, arguments):
    usual = dict(
        symbols=np.zeros((2, 4, 2), np.complex64), block_snr=np.ones((2, 4), np.float32), num_symbols=6, snr_db=0.0
    )
    with pytest.raises(ValueError, match=message):
        codec.decode(**usual | arguments)
