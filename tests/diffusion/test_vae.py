"""AutoencoderKL against PyTorch diffusers with random weights, and its configuration."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.vae import ONLY, AutoencoderKL, VAEConfig
from tests.checks import assert_equal_trees

PARITY = 1e-4
BRACKETS = str.maketrans("", "", "[]()")  # lists of a config.json are tuples here
# Published vae/config.json of Stable Diffusion 1.5 and 2.1.
SD_15 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
}
SD_21 = SD_15 | {
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/vae",
    "sample_size": 768,
}
# name -> (settings beside conftest's VAE, image size, which need not be a multiple of the downsampling)
CONFIGS = {
    "two levels, no attention": ({"mid_block_add_attention": False}, (7, 10)),
    "one level, no quantisation convolutions": (
        {"block_out_channels": (8,), "use_quant_conv": False, "use_post_quant_conv": False},
        (5, 3),
    ),
    "three levels, odd size, grey": (
        {
            "block_out_channels": (16, 8, 8),
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 8,
            "norm_num_groups": 8,
        },
        (21, 13),
    ),
    "sd-shaped, four levels": ({"block_out_channels": (8, 16, 24, 24), "layers_per_block": 2}, (16, 24)),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in [*CONFIGS][2:]]


@pytest.mark.parametrize("name", [*[*CONFIGS][:2], *SLOW])
def test_encode_and_decode_equal_diffusers(make_vae, error_of, name):
    settings, size = CONFIGS[name]
    for ours, reference in make_vae(**settings).vae_outputs(*size, checked=size == (7, 10)):
        assert error_of(ours, reference) <= PARITY


def test_log_variance_is_clipped_as_diffusers_clips_it(tiny_vae):
    import torch

    image = np.full((1, 3, 4, 4), 1e3, np.float32)
    weights = dict(tiny_vae.torch.quant_conv.named_parameters())
    with torch.no_grad():
        moments = tiny_vae.torch.quant_conv(tiny_vae.torch.encoder(torch.tensor(image)))
        scale = 1000.0 / moments.abs().min()
        saved = {name: value.clone() for name, value in weights.items()}
        for value in weights.values():
            value.mul_(scale)
        reference = tiny_vae.torch.encode(torch.tensor(image)).latent_dist.logvar
        for name, value in weights.items():
            value.copy_(saved[name])

    def scaled(model, image):
        model.quant_conv.kernel[...] *= float(scale)
        model.quant_conv.bias[...] *= float(scale)
        return model.encode(image)[1]

    ours = tiny_vae.run(scaled, image.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(np.asarray(ours).transpose(0, 3, 1, 2), reference)
    assert set(np.unique(ours)) <= {-30.0, 20.0}


@pytest.mark.parametrize("shape", ["linear", "1x1 convolution"])
def test_legacy_attention_loads_identically(tiny_vae, tmp_path, shape):
    from safetensors.torch import save_file

    legacy = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in tiny_vae.torch.state_dict().items():
        if ".attentions.0.to_" in name:
            new = name.split(".attentions.0.")[1].rsplit(".", 1)[0]
            name = name.replace(new, legacy[new])
            value = value[:, :, None, None] if shape != "linear" and value.ndim == 2 else value
        tensors[name] = value.contiguous()
    assert sum(".proj_attn." in name for name in tensors) == 4
    save_file(tensors, tmp_path / "old.safetensors")

    assert_equal_trees(tiny_vae.load([tmp_path / "old.safetensors"]), tiny_vae.params)


def test_bfloat16_is_close_to_float32(tiny_vae, half_close):
    (mean, reference), _, (image, decoded) = tiny_vae.replace(dtype=jnp.bfloat16).vae_outputs(8, 8)
    assert mean.dtype == image.dtype == jnp.float32
    half_close(mean, reference, tiny_vae.params)
    half_close(image, decoded, tiny_vae.params)


def test_float16_is_replaced_where_the_checkpoint_would_overflow():
    for dtype, upcast, expected in (
        (jnp.float16, True, jnp.float32),
        (jnp.float16, False, jnp.float16),
        (jnp.bfloat16, True, jnp.bfloat16),
    ):
        assert VAEConfig.from_dict(SD_15 | {"force_upcast": upcast}, dtype=dtype).dtype == expected


@pytest.mark.slow
def test_gradients_reach_every_weight(gradients_flow, random_params, unchecked):
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = VAEConfig(block_out_channels=(8, 8), norm_num_groups=2, **kinds)
    graph, params = random_params(lambda: AutoencoderKL(config, rngs=ShapeRngs()))
    image = jnp.sin(jnp.arange(192.0)).reshape(1, 8, 8, 3)

    def loss(params):
        model = nnx.merge(graph, params)
        mean, log_variance = model.encode(image)
        return jnp.mean((model.decode(mean) - image) ** 2) + jnp.mean(mean**2 + jnp.exp(log_variance) - log_variance)

    gradients_flow(loss, params)


def test_size_of_the_published_checkpoint():
    config = VAEConfig.from_dict(SD_15)
    state = nnx.state(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=ShapeRngs())))
    assert sum(value.size for _, value in nnx.to_flat_state(state)) == 83_653_863


def test_published_configs_are_read():
    for values in (SD_15, SD_21):
        config = VAEConfig.from_dict(values)
        assert (config.scaling_factor, config.downsample, config.sample_size) == (0.18215, 8, values["sample_size"])
    assert VAEConfig.from_dict(SD_15 | {"scaling_factor": 0.5}).scaling_factor == 0.5


def test_defaults_are_those_of_diffusers():
    from diffusers import AutoencoderKL as Reference

    defaults = {k: p.default for k, p in inspect.signature(Reference.__init__).parameters.items() if k != "self"}
    ours = VAEConfig().to_dict()
    del ours["_class_name"]
    assert ours == defaults


@pytest.mark.parametrize("values", [SD_15, SD_21])
def test_dictionaries_round_trip_through_json_and_diffusers(values):
    import torch
    from diffusers import AutoencoderKL as Reference

    config = VAEConfig.from_dict(values)
    written = json.loads(json.dumps(config.to_dict()))
    assert VAEConfig.from_dict(written) == config
    with torch.device("meta"):
        accepted = Reference.from_config(written).config
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    assert {key: accepted[key] for key in own} == own


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [0.1, 0.2, 0.3, 0.4]),
        ("latents_std", [1.0]),
        ("shift_factor", 0.1159),
        ("act_fn", "gelu"),
        ("scaling_factor", 0.0),
        ("layers_per_block", 0),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("a_setting_of_tomorrow", 7),
    ],
)
def test_unsupported_settings_are_named(key, value):
    with pytest.raises(ValueError) as error:
        VAEConfig.from_dict(SD_15 | {key: value})
    assert key in str(error.value)
    assert repr(value).translate(BRACKETS) in str(error.value).translate(BRACKETS)


def test_every_other_setting_is_refused_unless_neutral():
    for key, value in ONLY.items():
        VAEConfig.from_dict(SD_15 | {key: value})
        with pytest.raises(ValueError, match=f"{key} is 'other'"):
            VAEConfig.from_dict(SD_15 | {key: "other"})
