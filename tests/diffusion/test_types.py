"""Types of activations, of parameters in memory and of stored weights."""

import copy
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from megjax.codec import SeedCodec
from megjax.configs import read_json, write_json
from megjax.diffusion.pipeline import StableDiffusion

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")

HALVES = ("bfloat16", "float16")
TYPES = ("float32", *HALVES)
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def pipes(tiny_model, tmp_path_factory):
    """`pipes(dtype, param_dtype)`: the model of float16 weights, in a folder whose VAE does not ask for float32."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("types") / "model")
    config = folder / "vae" / "config.json"
    write_json(config, read_json(config) | {"force_upcast": False})

    @functools.cache
    def load(dtype="float32", param_dtype="float32"):
        return StableDiffusion.from_pretrained(folder, getattr(jnp, dtype), param_dtype=getattr(jnp, param_dtype))

    return load


def flat(params):
    return {(part, *path): np.asarray(value[...]) for part in params for path, value in nnx.to_flat_state(params[part])}


PAIRS = [
    pytest.param(memory, storage, marks=() if (memory, storage) == ("bfloat16", "float16") else pytest.mark.slow)
    for memory in TYPES
    for storage in TYPES
]


@pytest.mark.parametrize(("memory", "storage"), PAIRS)
def test_weights_of_every_type_are_stored_in_every_type(pipes, tmp_path, memory, storage):
    pipe = pipes("float32", memory)
    pipe.save_pretrained(tmp_path, dtype=getattr(jnp, storage))
    assert {tensor.dtype.name for tensor in load_file(tmp_path / WEIGHTS).values()} == {storage}
    again = flat(StableDiffusion.from_pretrained(tmp_path, param_dtype=getattr(jnp, memory)).params)
    for path, value in flat(pipe.params).items():
        assert value.dtype.name == again[path].dtype.name == memory
        np.testing.assert_array_equal(again[path], value.astype(storage).astype(memory))


@pytest.mark.slow
@pytest.mark.parametrize("storage", EIGHT_BITS)
def test_weights_of_8_bits(pipes, tmp_path, storage):
    pipes().save_pretrained(tmp_path, dtype=getattr(jnp, storage))
    again = flat(StableDiffusion.from_pretrained(tmp_path).params)
    for path, value in flat(pipes().params).items():
        np.testing.assert_array_equal(again[path], value.astype(storage).astype(np.float32))


@pytest.mark.parametrize(("storage", "message"), [("float64", "must be one of"), ("float8", "must be one of")])
def test_other_types_are_not_written(pipes, tmp_path, storage, message):
    with pytest.raises(ValueError, match=f"dtype is '{storage}'; it {message}"):
        pipes().save_pretrained(tmp_path / "new", dtype=storage)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("storage", "value"), [("float8_e4m3fn", 500.0), ("float16", 1e5)])
def test_what_a_type_cannot_hold_is_not_written(pipes, tmp_path, storage, value):
    pipe = pipes()
    large = jax.tree.map(lambda x: jnp.full_like(x, value), pipe.params["vae"])
    pipe = StableDiffusion(pipe.configs, pipe.graphs, pipe.params | {"vae": large}, pipe.tokenizer)
    with pytest.raises(ValueError, match=rf"vae: magnitude of \S+ is {value}; it must be at most .* as {storage}"):
        pipe.save_pretrained(tmp_path / "new", dtype=getattr(jnp, storage))
    assert not (tmp_path / "new").exists()


def test_a_type_that_numpy_lacks_is_named_with_file_and_tensor(pipes, tmp_path):
    pipes().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].astype(jnp.float8_e5m2)}, tmp_path / WEIGHTS)
    raw = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(raw.replace(b"F8_E5M2", b"F8_E8M0", 1))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: type of {name} is 'F8_E8M0'; it must be one of"):
        StableDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", ["bf16", "float64", None])
def test_unknown_types_of_a_pipeline(tiny_model, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be one of"):
        StableDiffusion.from_pretrained(tiny_model, **{name: value})


def test_unknown_types_of_a_codec(tiny_codec, tmp_path):
    with pytest.raises(ValueError, match="^dtype is 'bf16'; it must be one of"):
        SeedCodec.from_pretrained(tiny_codec, dtype="bf16")
    with pytest.raises(ValueError, match="^dtype is 'float8_e5m2'; it must be one of"):
        SeedCodec.from_pretrained(tiny_codec).save_pretrained(tmp_path / "new", jnp.float8_e5m2)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_type_by_its_name(tiny_model):
    assert StableDiffusion.from_pretrained(tiny_model, "bfloat16").configs.unet.dtype == jnp.bfloat16


def outputs(pipe):
    """The U-Net's output in a sampler's only step, the image of a latent, and the latent of an image."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, *pipe.latent_shape()), np.float32)
    options = {"num_steps": 1, "guidance_scale": 1.0, "sampler": "ddim", "initial_noise": noise}
    latents = pipe.generate_latents(KEY, pipe.tokenize(["a small red house on the right"]), **options)
    of_noise, of_output = pipe.sampler("ddim", 1).x0_weights[0]
    pixels = rng.uniform(size=(1, *pipe.image_size, 3)).astype(np.float32)
    return (latents - of_noise * noise) / of_output, pipe.decode(noise), pipe.encode(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("memory", ["float32", "half"])
def test_half_precision_is_close_to_float32(pipes, half_close, dtype, memory):
    """With the same parameters: only the activations' type differs. Attention's products are layers without kernels."""
    memory = dtype if memory == "half" else memory
    low, params = outputs(pipes(dtype, memory)), pipes(dtype, memory).params
    exact = copy.copy(pipes())
    exact.params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    reference = outputs(exact)
    vae, rest = {"vae": params["vae"]}, {"text": params["text_encoder"], "unet": params["unet"]}
    for found, expected, network, gain in zip(low, reference, (rest, vae, vae), (2.0, 1.0, 1.0), strict=True):
        assert found.dtype == jnp.float32
        half_close(found, expected, nnx.State(network), getattr(jnp, dtype), gain)
