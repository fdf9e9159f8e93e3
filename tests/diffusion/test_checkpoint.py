"""Reading and writing weights in diffusers' layout: shards, variants, damage, and strictness."""

import copy
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megjax.diffusion import checkpoint
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.vae import AutoencoderKL, VAEConfig
from megjax.files import read_safetensors
from tests.checks import assert_equal_trees

STEM = checkpoint.UNET_WEIGHTS
SHARD = "20KB"


@pytest.fixture
def read(tiny_vae):
    """`read(folder, variant)`: the parameters of the tiny VAE, loaded from `folder`."""

    def load(folder, variant=None):
        return tiny_vae.load(checkpoint.weight_files(folder, STEM, variant))

    return load


@pytest.fixture
def folder(tiny_vae, tmp_path):
    """A copy of the tiny VAE's folder that a test may damage."""
    return shutil.copytree(tiny_vae.folder, tmp_path / "vae")


def assert_equal(params, expected):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert_equal_trees(params, expected)


def rewrite(folder, change):
    path = folder / f"{STEM}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("sharded", "dtype", "variant"),
    [
        (False, "float32", None),
        (True, "float32", "fp16"),
        (True, "float16", None),
        (False, "float16", "fp16"),
        (True, "bfloat16", None),
        (False, "bfloat16", "fp16"),
    ],
)
def test_single_sharded_and_variant_files_load(tiny_vae, read, tmp_path, sharded, dtype, variant):
    model = copy.deepcopy(tiny_vae.torch).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, variant=variant, **({"max_shard_size": SHARD} if sharded else {}))
    assert (len(checkpoint.weight_files(tmp_path, STEM, variant)) > 1) == sharded
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), tiny_vae.params)
    assert_equal(read(tmp_path, variant), rounded)
    # Without a variant named, the only files there are serve.
    named = checkpoint.weight_files(tmp_path, STEM, variant)
    assert checkpoint.weight_files(tmp_path, STEM) == named


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_text_encoder_loads(tiny_text, tmp_path, variant):
    tiny_text.torch.save_pretrained(tmp_path, variant=variant, max_shard_size=SHARD)
    files = checkpoint.weight_files(tmp_path, checkpoint.TEXT_WEIGHTS, variant)
    assert len(files) > 1
    assert_equal(tiny_text.load(files), tiny_text.params)


def test_full_precision_is_preferred_and_serves_for_an_absent_variant(folder):
    for variant in (None, "fp16"):
        assert [file.name for file in checkpoint.weight_files(folder, STEM, variant)] == [f"{STEM}.safetensors"]
    assert not checkpoint.find_weights(folder, STEM, "fp16")
    shutil.copy(folder / f"{STEM}.safetensors", folder / f"{STEM}.fp16.safetensors")
    assert [file.name for file in checkpoint.weight_files(folder, STEM)] == [f"{STEM}.safetensors"]
    assert [file.name for file in checkpoint.weight_files(folder, STEM, "fp16")] == [f"{STEM}.fp16.safetensors"]


def test_parameters_take_the_type_asked_for(tiny_vae, folder):
    files = checkpoint.weight_files(folder, STEM)
    params = tiny_vae.load(files, param_dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_everything_that_does_not_fit_is_listed_at_once(folder, read):
    def change(tensors):
        del tensors["decoder.conv_in.weight"], tensors["encoder.conv_out.bias"]
        tensors["decoder.conv_out.weight"] = torch.zeros(3, 8, 1, 1)
        tensors["quant_conv.bias"] = torch.zeros(8, 1)
        tensors["encoder.mid_block.attentions.0.to_q.bias"] = torch.zeros(8, 1, 1)
        tensors["decoder.mid_block.attentions.0.to_q.weight"] = torch.zeros(8, 8, 1, 2)
        tensors["loss.discriminator.weight"] = torch.zeros(2)

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        read(folder)
    for part in (
        str(folder),
        "missing decoder.conv_in.weight",
        "missing encoder.conv_out.bias",
        "decoder.conv_out.weight has shape (3, 8, 1, 1), expected (3, 8, 3, 3)",
        "quant_conv.bias has shape (8, 1), expected (8,)",
        "encoder.mid_block.attentions.0.to_q.bias has shape (8, 1, 1), expected (8,)",
        "decoder.mid_block.attentions.0.to_q.weight has shape (8, 8, 1, 2), expected (8, 8)",
        "extra loss.discriminator.weight",
    ):
        assert part in str(error.value)
    assert str(error.value).count(";") == 6  # and nothing else


def test_weights_of_another_width_are_mis_shaped(folder, read, random_params):
    """A kernel of transposed or otherwise permuted shape must not pass for the right one."""
    config = VAEConfig(block_out_channels=(16,), norm_num_groups=4)
    _, params = random_params(lambda: AutoencoderKL(config, rngs=ShapeRngs()))
    checkpoint.save_params(params, folder / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=r"decoder.conv_in.weight has shape \(16, 4, 3, 3\), expected \(8, 4, 3, 3\)"):
        read(folder)


def cut(data):
    return data[: len(data) // 2]


def cut_in_header(data):
    return data[:40]


def empty(data):
    return b""


def garbage(data):
    return bytes(range(256)) * 20


def bad_header(data):
    return data[:8] + b"#" * (len(data) - 8)


def bad_offsets(data):
    return data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)


def unknown_type(data):
    return data.replace(b'"F32"', b'"Q32"', 1)


@pytest.mark.parametrize("damage", [cut, cut_in_header, empty, garbage, bad_header, bad_offsets, unknown_type])
def test_a_damaged_file_is_named(folder, read, damage):
    path = folder / f"{STEM}.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError) as error:
        read(folder)
    assert str(error.value).startswith(f"{path} is not a whole safetensors file (truncated or corrupted)")
    assert "\n" not in str(error.value)


def test_a_damaged_shard_is_named(tiny_vae, read, tmp_path):
    tiny_vae.torch.save_pretrained(tmp_path, max_shard_size=SHARD)
    last = checkpoint.weight_files(tmp_path, STEM)[-1]
    last.write_bytes(cut(last.read_bytes()))
    with pytest.raises(ValueError, match=f"{last} is not a whole safetensors file"):
        read(tmp_path)


def test_a_missing_shard_is_named(tiny_vae, read, tmp_path):
    tiny_vae.torch.save_pretrained(tmp_path, max_shard_size=SHARD)
    first = checkpoint.weight_files(tmp_path, STEM)[0]
    first.unlink()
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert first.name in str(error.value)
    assert f"{STEM}.safetensors.index.json" in str(error.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {}}', "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(tmp_path, text):
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=str(index)):
        checkpoint.weight_files(tmp_path, STEM)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError) as error:
        checkpoint.weight_files(tmp_path, STEM)
    for part in (
        str(tmp_path),
        name,
        "refused",
        "convert them",
        "save_pretrained(new_folder, safe_serialization=True)",
    ):
        assert part in str(error.value)


def test_pickles_beside_safetensors_are_left_alone(folder, read, tiny_vae):
    (folder / f"{STEM}.bin").write_bytes(b"\x80\x04.")
    assert_equal(read(folder), tiny_vae.params)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"model folder is '{tmp_path / 'none'}'; it must be an existing folder"):
        checkpoint.weight_files(tmp_path / "none", STEM)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no {STEM}.safetensors"):
        checkpoint.weight_files(tmp_path, STEM)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no {STEM}.fp16.safetensors or {STEM}.safetensors"):
        checkpoint.weight_files(tmp_path, STEM, "fp16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_saved_parameters_come_back_and_open_in_torch(tiny_vae, folder, read, dtype):
    path = folder / f"{STEM}.safetensors"
    path.unlink()
    checkpoint.save_params(tiny_vae.params, path, dtype=dtype)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), tiny_vae.params)
    assert_equal(read(folder), rounded)
    # Strict: diffusers itself only warns of missing and extra tensors.
    opened, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    reference = tiny_vae.torch.state_dict()
    assert opened.state_dict().keys() == reference.keys()
    for name, value in opened.state_dict().items():
        assert torch.equal(value, reference[name].to(getattr(torch, dtype.__name__)).to(value.dtype))


def test_saved_names_and_shapes_are_those_of_torch(tiny_unet, tiny_text, tmp_path):
    for port, prefix in ((tiny_unet, ""), (tiny_text, "text_model.")):
        path = tmp_path / "weights.safetensors"
        saved = port.state_dict(path)
        reference = {name.removeprefix("text_model."): value for name, value in port.torch.state_dict().items()}
        assert saved.keys() == reference.keys()
        assert all(torch.equal(value, reference[name]) for name, value in saved.items())
        checkpoint.save_params(port.params, path, prefix=prefix)
        assert read_safetensors(path).keys() == {prefix + name for name in reference}
