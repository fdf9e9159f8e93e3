"""UNet2DConditionModel against PyTorch diffusers with random weights, and its configuration."""

import inspect
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion.attention import attend
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.layers import GroupNorm, ShapeRngs, Upsample2D
from megjax.diffusion.unet import ONLY, UNet2DConditionModel, UNetConfig, timestep_features

PARITY = 1e-4
BRACKETS = str.maketrans("", "", "[]()")  # lists of a config.json are tuples here
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
# Published unet/config.json of Stable Diffusion 1.5 and 2.1.
SD_15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD_21 = SD_15 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# name -> (settings beside conftest's UNET, latent size)
CONFIGS = {
    "depths and heads by level": (
        {
            "layers_per_block": (1, 2),
            "transformer_layers_per_block": (2, 1),
            "attention_head_dim": (2, 8),
            "up_block_types": (UP[1],) * 2,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        (8, 12),
    ),
    "attention below, linear projections": (
        {
            "down_block_types": DOWN[::-1],
            "up_block_types": UP,
            "use_linear_projection": True,
            "upcast_attention": True,
            "norm_eps": 1e-3,
        },
        (1, 3),
    ),
    "attention on the way up only": (
        {
            "block_out_channels": (32, 16, 24),
            "down_block_types": (DOWN[1],) * 3,
            "up_block_types": (UP[1], UP[0], UP[1]),
            "in_channels": 9,
            "out_channels": 3,
        },
        (5, 11),
    ),
}


@pytest.mark.parametrize("name", [*CONFIGS][:2] + [pytest.param([*CONFIGS][2], marks=pytest.mark.slow)])
def test_output_equals_diffusers(make_unet, error_of, name):
    settings, size = CONFIGS[name]
    assert error_of(*make_unet(**settings).unet_outputs(*size, checked=size == (1, 3))) <= PARITY


@pytest.mark.slow
def test_output_equals_diffusers_at_the_depth_of_stable_diffusion(make_unet, error_of):
    settings = {key: value for key, value in SD_15.items() if not key.startswith("_")}
    port = make_unet(**settings | {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 12})
    assert error_of(*port.unet_outputs(8, 8, tokens=77)) <= PARITY


@pytest.mark.slow
def test_the_error_sees_the_number_of_heads(tiny_unet, error_of):
    """The same weights with another `attention_head_dim` have the same shapes, so only the output can tell."""
    assert error_of(*tiny_unet.replace(attention_head_dim=2).unet_outputs(4, 4)) > 10 * PARITY


@pytest.mark.parametrize(("width", "flip", "shift"), [(32, True, 0), (32, False, 1), (33, True, 1)])
def test_timestep_features_equal_diffusers(width, flip, shift):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    times = [0, 1, 500, 999]
    reference = get_timestep_embedding(torch.tensor(times), width, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    ours = timestep_features(jnp.asarray(times), width, flip_sin_to_cos=flip, freq_shift=shift)
    # An angle of up to 999 radians carries a float32 rounding of 2^-14, and both sides round.
    np.testing.assert_allclose(ours, reference.numpy(), rtol=0, atol=2 * 2.0**-14)


@pytest.mark.parametrize("size", [(1, 1, 8), (512, 256, 8)])
def test_group_norm_equals_torch_off_centre(error_of, size):
    """Also with a mean of several deviations, over as many pixels as the decoder's last level has."""
    import torch

    rng = np.random.default_rng(0)
    channels = size[-1]
    x = (rng.standard_normal((2, *size)) * 2 + rng.uniform(-10, 10, channels)).astype(np.float32)
    scale, bias = rng.standard_normal((2, channels)).astype(np.float32)
    x64, scale64, bias64 = (torch.tensor(v, dtype=torch.float64) for v in (x.transpose(0, 3, 1, 2), scale, bias))
    reference = torch.nn.functional.group_norm(x64, 4, scale64, bias64, 1e-6)
    norm = GroupNorm(channels, 4, 1e-6, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    assert error_of(jax.jit(lambda x: norm(x))(x), reference.permute(0, 2, 3, 1)) <= PARITY / 10


@pytest.mark.parametrize("length", [1, 2, 5, 32])
def test_upsampling_to_any_size_equals_torch(length):
    import torch

    x = np.arange(length, dtype=np.float32)
    layer = Upsample2D(1, jnp.float32, rngs=nnx.Rngs(0))
    layer.conv.kernel[...] = np.float32(np.arange(9) == 4).reshape(3, 3, 1, 1)  # nothing but the upsampling
    targets = [2 * length - 1, 2 * length]
    found = jax.jit(lambda x: [layer(x, (target, 2)) for target in targets])(x[None, :, None, None])
    for target, ours in zip(targets, found, strict=True):
        reference = torch.nn.functional.interpolate(torch.tensor(x)[None, None, :, None], size=(target, 2))
        np.testing.assert_array_equal(ours[0, :, :, 0], reference[0, 0])


def test_bfloat16_is_close_to_float32(tiny_unet, half_close):
    low, reference = tiny_unet.replace(dtype=jnp.bfloat16).unet_outputs(8, 4)
    assert low.dtype == jnp.float32
    half_close(low, reference, tiny_unet.params)


@pytest.mark.parametrize("upcast", [False, True])
def test_attention_in_bfloat16_has_float32_logits(upcast):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 6, 64)) * gain, jnp.bfloat16) for gain in (3, 3, 1))
    query64, key64, value64 = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqd,bsd->bqs", query64, key64) / 8
    assert np.abs(logits).max() > 16  # rounded to bfloat16, such a logit is off by up to 2^-4
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = jax.jit(partial(attend, num_heads=1, upcast=upcast))(query, key, value)
    assert out.dtype == jnp.bfloat16
    # What remains is the rounding of the weights and of the output, each by a relative 2^-9, half a unit.
    bound = 2 * 2.0**-9 * np.abs(value64).max()
    reference = weights / weights.sum(-1, keepdims=True) @ value64
    assert np.abs(np.asarray(out, np.float64) - reference).max() <= bound
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    weights = np.exp(rounded - rounded.max(-1, keepdims=True))
    assert np.abs(weights / weights.sum(-1, keepdims=True) @ value64 - reference).max() > bound


@pytest.mark.slow
def test_gradients_reach_every_weight_of_unet_and_text_encoder(gradients_flow, random_params, unchecked):
    unet_config = UNetConfig(
        block_out_channels=(8,),
        down_block_types=(DOWN[1],),
        up_block_types=(UP[1],),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    text_config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    unet_graph, unet_params = random_params(lambda: UNet2DConditionModel(unet_config, rngs=ShapeRngs()))
    text_graph, text_params = random_params(lambda: CLIPTextModel(text_config, rngs=ShapeRngs()))
    noise = jnp.sin(jnp.arange(128.0)).reshape(2, 4, 4, 4)

    def loss(params):
        context = nnx.merge(text_graph, params[1])(jnp.array([[1, 2, 3], [4, 5, 6]]))
        return jnp.mean((nnx.merge(unet_graph, params[0])(noise, jnp.array([3, 700]), context) - noise) ** 2)

    gradients_flow(loss, (unet_params, text_params))


def abstract_model(config):
    return nnx.split(nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=ShapeRngs())))


def size_of(params):
    return sum(value.size for value in jax.tree.leaves(params))


def test_size_of_a_published_checkpoint(unchecked):
    assert size_of(abstract_model(UNetConfig.from_dict(SD_15))[1]) == 859_520_964


@pytest.mark.slow
def test_a_published_model_is_traced(unchecked):
    config = UNetConfig.from_dict(SD_21, dtype=jnp.bfloat16)
    graph, params = abstract_model(config)
    assert size_of(params) == 865_910_724
    shapes = (2, config.sample_size, config.sample_size, 4), (2,), (2, 77, config.cross_attention_dim)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    output = jax.eval_shape(lambda params, *args: nnx.merge(graph, params)(*args), params, *arguments)
    assert output.shape == shapes[0] and output.dtype == jnp.float32


def test_published_configs_are_read():
    config = UNetConfig.from_dict(SD_21, dtype=jnp.bfloat16)
    assert config.attention_head_dim == (5, 10, 20, 20)
    assert config.per_block("layers_per_block") == (2, 2, 2, 2)
    assert (config.sample_size, config.upcast_attention, config.use_linear_projection) == (96, True, True)
    assert config.dtype == jnp.bfloat16
    assert UNetConfig.from_dict(SD_15).attention_head_dim == 8


def test_defaults_are_those_of_diffusers():
    from diffusers import UNet2DConditionModel as Reference

    defaults = {k: p.default for k, p in inspect.signature(Reference.__init__).parameters.items() if k != "self"}
    ours = UNetConfig().to_dict()
    del ours["_class_name"]
    assert ours == defaults


@pytest.mark.parametrize("values", [SD_15, SD_21])
def test_dictionaries_round_trip_through_json_and_diffusers(values):
    import torch
    from diffusers import UNet2DConditionModel as Reference

    config = UNetConfig.from_dict(values)
    written = json.loads(json.dumps(config.to_dict()))
    assert UNetConfig.from_dict(written) == config
    with torch.device("meta"):
        accepted = Reference.from_config(written).config
    assert {k: accepted[k] for k in values if not k.startswith("_")} == {
        k: v for k, v in values.items() if not k.startswith("_")
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("act_fn", "gelu"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("dual_cross_attention", True),
        ("only_cross_attention", [True, False, False, False]),
        ("num_attention_heads", 8),
        ("encoder_hid_dim", 4096),
        ("mid_block_type", "UNetMidBlock2D"),
        ("dropout", 0.1),
        ("conv_in_kernel", 1),
        ("a_setting_of_tomorrow", 7),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("attention_head_dim", [8, 8]),
        ("attention_head_dim", 0),
        ("attention_head_dim", 7),
        ("layers_per_block", 0),
        ("layers_per_block", "2"),
        ("transformer_layers_per_block", [[1, 2], 1, 1, 1]),
        ("cross_attention_dim", [768, 768, 768, 768]),
    ],
)
def test_unsupported_settings_are_named(key, value):
    with pytest.raises(ValueError) as error:
        UNetConfig.from_dict(SD_15 | {key: value})
    assert key in str(error.value)
    assert repr(value).translate(BRACKETS) in str(error.value).translate(BRACKETS)


def test_every_other_setting_is_refused_unless_neutral():
    for key, value in ONLY.items():
        UNetConfig.from_dict(SD_15 | {key: value})
        with pytest.raises(ValueError, match=f"{key} is 'other'"):
            UNetConfig.from_dict(SD_15 | {key: "other"})


def test_text_of_another_width_is_refused(tiny_unet):
    with pytest.raises(ValueError, match="width of the text features is 13; it must be 12"):
        nnx.merge(tiny_unet.graph, tiny_unet.params).texts(jnp.ones((1, 3, 13)))


def test_group_norm_refuses_uneven_groups():
    with pytest.raises(ValueError, match="norm_num_groups is 3"):
        GroupNorm(8, 3, 1e-5, rngs=nnx.Rngs(0))
