"""What users pass: plain forms are accepted, anything else is one line that names it and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megjax
from megjax.codec import SeedCodec
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import as_key
from megjax.system import Split, SystemConfig, make_simulator

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")

KEY, PROMPTS = jax.random.key(0), ["a small red house on the right"]
ONE_STEP = {"num_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return StableDiffusion.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def codec(tiny_codec):
    return SeedCodec.from_pretrained(tiny_codec)


@pytest.fixture(scope="module")
def ids(pipe):
    return pipe.tokenize(PROMPTS)


def error_of(function, *args, **options):
    """The message of the ValueError that a call ends with; it is one line."""
    with pytest.raises(ValueError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint32(7)])
def test_a_seed_stands_for_its_key(seed):
    assert as_key(seed) == jax.random.key(7)


def test_an_old_key_keeps_its_words():
    np.testing.assert_array_equal(jax.random.key_data(as_key(jax.random.PRNGKey(7))), jax.random.PRNGKey(7))
    assert as_key(KEY) is KEY


@pytest.mark.parametrize("key", [True, 0.5, "0", None, 2**32, [0, 1], jax.random.split(KEY), np.zeros(2)])
def test_what_is_no_key(key):
    assert error_of(as_key, key).startswith("key is ")


@pytest.mark.slow
def test_plain_forms_of_all_that_generation_takes(pipe, ids):
    usual = pipe.generate_latents(KEY, ids, height=32, width=32, **ONE_STEP)
    noise = np.asarray(usual).tolist()
    sizes = {"height": np.int64(32), "width": np.int32(32), "num_steps": np.int64(1), "guidance_scale": np.float32(1)}
    np.testing.assert_array_equal(pipe.generate_latents(0, ids.tolist(), **sizes), usual)
    given = pipe.generate_latents(0, ids.tolist(), initial_noise=noise, **sizes)
    np.testing.assert_array_equal(given, pipe.generate_latents(KEY, ids, initial_noise=usual, **sizes))
    np.testing.assert_array_equal(pipe.decode(noise, np.int64(1)), pipe.decode(usual))


BAD = [
    ({"key": "0"}, "key is '0'; it must be one key"),
    ({"ids": []}, "ids is float64 of shape (0,); it must be integers of shape [b l]"),
    ({"ids": np.zeros((0, 48), np.int32)}, "ids is int32 of shape (0, 48); it must be"),
    ({"ids": [[1, 2], [3]]}, "ids has rows of different lengths; it must be"),
    ({"ids": PROMPTS}, "ids is <U30 of shape (1,); it must be"),
    ({"ids": [[0.5]]}, "ids is float64 of shape (1, 1); it must be"),
    ({"ids": [[49408]]}, "ids from smallest to largest is (49408, 49408); it must be in 0 to "),
    ({"negative_ids": [[-1] * 48]}, "negative_ids from smallest to largest is (-1, -1); it must be in 0 to "),
    ({"negative_ids": [1, 2]}, "negative_ids is int64 of shape (2,); it must be"),
    ({"guidance_scale": np.array([3.0])}, "guidance_scale is array([3.]); it must be one finite number"),
    ({"guidance_scale": "3"}, "guidance_scale is '3'; it must be one finite number"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be one finite number"),
    ({"num_steps": 2.0}, "num_steps is 2.0; it must be an integer of at least 1"),
    ({"num_steps": True}, "num_steps is True; it must be"),
    ({"eta": "0"}, "eta is '0'; it must be one finite number"),
    ({"height": np.int64(33)}, "height is "),
    ({"initial_noise": [1.0]}, "initial_noise's shape is (1,); it must be (1, 4, 4, 4)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_of_generation(pipe, ids, options, message):
    given = {"key": KEY, "ids": ids, "guidance_scale": 3.0} | options
    for method in (pipe.generate, pipe.generate_latents):
        assert error_of(method, given["key"], **{k: v for k, v in given.items() if k != "key"}).startswith(message)


@pytest.mark.slow
def test_images_of_bytes_are_those_of_real_numbers(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (1, *pipe.image_size, 3), np.uint8)
    expected = pipe.encode(pixels.astype(np.float32) / 255)
    for given in (pixels, jnp.asarray(pixels)):
        np.testing.assert_allclose(pipe.encode(given), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    message = "images' type is 'int64'; it must be uint8, of 0 to 255, or real, of 0 to 1"
    assert error_of(pipe.encode, pixels.tolist()) == message


@pytest.mark.parametrize(("value", "found"), [(1.5, "(0.0, 1.5)"), (-0.1, "(-0.1"), (np.nan, "(nan, nan)")])
def test_images_outside_their_range(pipe, value, found):
    image = np.zeros((1, *pipe.image_size, 3), np.float32)
    image[0, 0, 0, 0] = value
    for given in (image, jnp.asarray(image)):
        assert error_of(pipe.encode, given).startswith(f"images from smallest to largest is {found}")


def test_bad_latents_images_and_prompts(pipe):
    message = "latents' shape is (0, 4, 4, 4); it must be [b h w c], all of at least 1"
    assert error_of(pipe.decode, np.zeros((0, 4, 4, 4))) == message
    assert error_of(pipe.encode, np.zeros((32, 32, 3))).startswith("images' shape is (32, 32, 3); it must be [b h w c]")
    assert error_of(pipe.tokenize, 5) == "prompts is 5; it must be a list of strings"
    assert error_of(pipe.tokenize, ["a \ud83d house"]).startswith("prompt is 'a \\ud83d house'; it must be text")
    assert pipe.tokenize(("a house \U0001f3e0",)).shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, "key is None; it must be one key"),
        ({"prompts": 5}, "prompts is 5; it must be a list of strings"),
        ({"snr_db": "10"}, "snr_db is '10'; it must be a finite number in dB"),
        ({"realisations": 1.5}, "realisations is 1.5; it must be an integer of at least 1"),
        ({"guidance_scale": [3.0]}, "guidance_scale is [3.0]; it must be one finite number"),
        ({"config": SystemConfig(num_steps=0)}, "num_steps is 0; it must be an integer of at least 1"),
    ],
)
def test_bad_arguments_of_a_simulation(pipe, codec, options, message):
    given = {
        "key": 0,
        "pipe": pipe,
        "codec": codec,
        "prompts": PROMPTS,
        "policy": "equal",
        "scheme": "seed:rate=2",
    } | options
    assert error_of(megjax.simulate, **given).startswith(message)


def test_pipeline_and_codec_in_each_others_place(pipe, codec):
    expected = "pipe is 'SeedCodec'; it must be a StableDiffusion"
    assert error_of(make_simulator, codec, pipe) == error_of(megjax.simulate, KEY, codec, pipe, PROMPTS) == expected
    assert error_of(make_simulator, pipe, pipe).startswith("codec is 'StableDiffusion'; it must be a SeedCodec")


def test_counts_of_numpy_serve_in_a_simulator(pipe, codec):
    def make(two, one, four):
        config = SystemConfig(num_steps=two, num_blocks=four)
        return make_simulator(pipe, codec, Split(one), policy="equal", config=config)

    usual, other = make(2, 1, 4), make(*(np.int64(count) for count in (2, 1, 4)))
    assert usual.link == other.link and usual.sampler.num_steps == other.sampler.num_steps


def test_bad_arguments_of_a_codec(codec):
    latents = np.zeros((1, 4, 4, 4), np.float32)
    assert error_of(codec.encode, latents, 16, "10").startswith("snr_db is '10'; it must be a finite number in dB")
    assert error_of(codec.encode, latents, 16.0, 10).startswith("num_symbols is 16.0; it must be an integer from 16")
    symbols, _ = codec.encode(latents, np.int64(16), np.float64(10), num_blocks=np.int64(4))
    assert symbols.shape == (1, 4, 4)


def test_a_rollout_names_the_key_that_it_needs():
    message = error_of(megjax.channel.rollout, 0, lambda key: jnp.float32(0), num=1)
    assert message == "key is 0; it must be one typed key, as jax.random.key(seed) makes"
