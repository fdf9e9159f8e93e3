"""UNet2DConditionModel: the text-conditioned denoiser of Stable Diffusion 1 and 2, in Flax NNX."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from megjax.configs import from_mapping, require, require_positive_integers
from megjax.diffusion.layers import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, conv, linear, narrow_conv
from megjax.diffusion.transformer import KeysAndValues, Transformer2DModel

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
# Settings of diffusers' class that published Stable Diffusion 1.x and 2.x checkpoints leave at these values.
ONLY = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet2DConditionModel; the names and defaults are those of its config.json.

    `attention_head_dim` is, as in diffusers, the *number of heads* (of every block, or of each).
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self):
        names = ("in_channels", "out_channels", "block_out_channels", "norm_num_groups", "cross_attention_dim")
        require_positive_integers(self, "unet", names)
        blocks = len(self.block_out_channels)
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            value = getattr(self, name)
            valid = len(value) == blocks and all(kind in allowed for kind in value)
            require(valid, f"unet: {name}", value, f"{blocks} of {allowed} (one for each of block_out_channels)")
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            each = (value,) * blocks if isinstance(value, int) else value
            valid = isinstance(each, tuple) and len(each) == blocks and all(isinstance(n, int) and n > 0 for n in each)
            require(valid, f"unet: {name}", value, f"a positive integer or a list of {blocks} of them")
        for heads, width in zip(self.per_block("attention_head_dim"), self.block_out_channels, strict=True):
            require(width % heads == 0, "unet: attention_head_dim", heads, f"a divisor of the {width} channels")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], dtype=jnp.float32) -> "UNetConfig":
        """Read a diffusers config.json; ValueError names any setting that is not supported."""
        return dataclasses.replace(from_mapping(cls, values, only=ONLY, source="unet config"), dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that diffusers' UNet2DConditionModel reads."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "dtype"}
        return {"_class_name": "UNet2DConditionModel", **values, **ONLY}

    def per_block(self, name: str) -> tuple[int, ...]:
        """The setting `name` for each block of the descending path."""
        value = getattr(self, name)
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value


def timestep_features(
    timesteps: Shaped[Array, " b"], width: int, *, flip_sin_to_cos: bool, freq_shift: int | float
) -> Float[Array, "b width"]:
    """Sinusoids of the timestep at geometric frequencies from 1 to 1/10000 (Vaswani et al. 2017, sec. 3.5), float32."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    features = jnp.concatenate(parts, axis=-1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


class TimestepEmbedding(nnx.Module):
    """Two dense layers over the sinusoids."""

    def __init__(self, inputs: int, outputs: int, dtype, *, rngs: nnx.Rngs):
        self.linear_1 = linear(inputs, outputs, dtype, rngs)
        self.linear_2 = linear(outputs, outputs, dtype, rngs)

    def __call__(self, x: Float[Array, "b f"]) -> Float[Array, "b e"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


def _transformer(config: UNetConfig, level: int, rngs: nnx.Rngs) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.per_block("attention_head_dim")[level],
        config.per_block("transformer_layers_per_block")[level],
        config.norm_num_groups,
        config.use_linear_projection,
        config.upcast_attention,
        config.dtype,
        rngs=rngs,
    )


def _resnet(config: UNetConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> ResnetBlock2D:
    time_dim = 4 * config.block_out_channels[0]
    groups, eps = config.norm_num_groups, config.norm_eps
    return ResnetBlock2D(inputs, outputs, groups, eps, config.dtype, time_dim=time_dim, rngs=rngs)


class DownBlock(nnx.Module):
    """Resnets, each with a transformer in the CrossAttn kind, then a halving unless it is the last level."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        inputs = [widths[max(level - 1, 0)]] + [widths[level]] * (config.per_block("layers_per_block")[level] - 1)
        self.resnets = nnx.List([_resnet(config, width, widths[level], rngs) for width in inputs])
        self.attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        if self.attends:
            self.attentions = nnx.List([_transformer(config, level, rngs) for _ in inputs])
        self.last = level == len(widths) - 1
        if not self.last:
            self.downsamplers = nnx.List([Downsample2D(widths[level], config.dtype, rngs=rngs)])

    def __call__(self, x, shifts, texts):
        """The result [b h2 w2 d] and the list of skips; takes what it needs of two iterators, as all blocks do."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(shifts))
            if self.attends:
                x = self.attentions[i](x, next(texts))
            skips.append(x)
        if not self.last:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        width, level = config.block_out_channels[-1], len(config.block_out_channels) - 1
        self.resnets = nnx.List([_resnet(config, width, width, rngs) for _ in range(2)])
        self.attends = True
        self.attentions = nnx.List([_transformer(config, level, rngs)])

    def __call__(self, x, shifts, texts):
        x = self.attentions[0](self.resnets[0](x, next(shifts)), next(texts))
        return self.resnets[1](x, next(shifts))


class UpBlock(nnx.Module):
    """Resnets over the input joined with one skip each, then a doubling unless it is the highest level.

    `position` counts up blocks from the lowest resolution; the skips come from the mirrored level of the way down.
    """

    def __init__(self, config: UNetConfig, position: int, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        level = len(widths) - 1 - position
        outputs, before, after = widths[level], widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        count = config.per_block("layers_per_block")[level] + 1
        inputs = [before] + [outputs] * (count - 1)
        skips = [outputs] * (count - 1) + [after]
        self.resnets = nnx.List([_resnet(config, i + s, outputs, rngs) for i, s in zip(inputs, skips, strict=True)])
        self.attends = config.up_block_types[position] == "CrossAttnUpBlock2D"
        if self.attends:
            self.attentions = nnx.List([_transformer(config, level, rngs) for _ in inputs])
        self.last = level == 0
        if not self.last:
            self.upsamplers = nnx.List([Upsample2D(outputs, config.dtype, rngs=rngs)])

    def __call__(self, x, skips, shifts, texts):
        """The result; takes its skips off the end of the list `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), next(shifts))
            if self.attends:
                x = self.attentions[i](x, next(texts))
        # Odd sizes: the way down rounded up, so the way up ends at the size of the skip that comes next.
        return x if self.last else self.upsamplers[0](x, skips[-1].shape[1:3])


class UNet2DConditionModel(nnx.Module):
    """Noisy latent, timestep and text features to the model output (noise or velocity)."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        widths, dtype = config.block_out_channels, config.dtype
        self.conv_in = conv(config.in_channels, widths[0], 3, dtype, rngs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], dtype, rngs=rngs)
        self.down_blocks = nnx.List([DownBlock(config, level, rngs=rngs) for level in range(len(widths))])
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(config, position, rngs=rngs) for position in range(len(widths))])
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, config.norm_eps, dtype, rngs=rngs)
        self.conv_out = narrow_conv(widths[0], config.out_channels, dtype, rngs)
        self.config = config

    def _blocks(self):
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def texts(self, context: Float[Array, "b l e"]) -> list[list[KeysAndValues]]:
        """Keys and values of text features for every transformer; ValueError if they are of another width."""
        width, expected = context.shape[-1], self.config.cross_attention_dim
        require(width == expected, "width of the text features", width, f"{expected} (cross_attention_dim)")
        context = context.astype(self.config.dtype)
        attentions = [attention for block in self._blocks() if block.attends for attention in block.attentions]
        return [attention.keys_and_values(context) for attention in attentions]

    def shifts(self, timesteps: Shaped[Array, " n"]) -> list[Float[Array, "n _"]]:
        """What timesteps add in every residual block, each of another width."""
        config = self.config
        options = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        features = timestep_features(timesteps, config.block_out_channels[0], **options)
        time = self.time_embedding(features.astype(config.dtype))
        return [resnet.shift(time) for block in self._blocks() for resnet in block.resnets]

    def __call__(
        self, x: Float[Array, "b h w c"], timesteps: Shaped[Array, " b"], context: Float[Array, "b l e"]
    ) -> Float[Array, "b h w d"]:
        """Model output in float32. Raises ValueError if `context` has another width than the checkpoint's."""
        return self.denoise(x, self.shifts(timesteps), self.texts(context))

    def denoise(
        self, x: Float[Array, "b h w c"], shifts: list[Float[Array, "#b _"]], texts: list[list[KeysAndValues]]
    ) -> Float[Array, "b h w d"]:
        """Model output for timesteps and text that have gone through `shifts` and `texts`."""
        shifts, texts = iter(shifts), iter(texts)
        x = self.conv_in(x.astype(self.config.dtype))
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, shifts, texts)
            skips += new
        x = self.mid_block(x, shifts, texts)
        for block in self.up_blocks:
            x = block(x, skips, shifts, texts)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)
