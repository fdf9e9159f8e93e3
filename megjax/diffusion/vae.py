"""AutoencoderKL: the variational autoencoder between images and latents (Rombach et al. 2022), in Flax NNX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.configs import from_mapping, require, require_positive_integers
from megjax.diffusion.attention import attend
from megjax.diffusion.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    conv,
    linear,
    narrow_conv,
    norm_silu_conv,
)

NORM_EPS = 1e-6
ONLY = {
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "act_fn": "silu",
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the names and defaults are those of its config.json."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self):
        names = ("in_channels", "out_channels", "block_out_channels", "latent_channels", "norm_num_groups")
        require_positive_integers(self, "vae", (*names, "layers_per_block"))
        blocks = len(self.block_out_channels)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            value = getattr(self, name)
            require(value == (kind,) * blocks, f"vae: {name}", value, f"{kind!r} {blocks} times (block_out_channels)")
        require(self.scaling_factor > 0, "vae: scaling_factor", self.scaling_factor, "positive")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], dtype=jnp.float32) -> "VAEConfig":
        """Read a diffusers config.json; ValueError names any setting that is not supported."""
        config = from_mapping(cls, values, only=ONLY, source="vae config")
        # force_upcast marks checkpoints that overflow in float16; bfloat16 has float32's range.
        upcast = config.force_upcast and jnp.dtype(dtype) == jnp.float16
        return dataclasses.replace(config, dtype=jnp.float32 if upcast else dtype)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that diffusers' AutoencoderKL reads."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "dtype"}
        return {"_class_name": "AutoencoderKL", **values, **ONLY}

    @property
    def downsample(self) -> int:
        """Image pixels per latent pixel, f_d."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(nnx.Module):
    """Single-head self-attention over the pixels of a feature map, with its own normalisation and residual."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, config.norm_num_groups, NORM_EPS, config.dtype, rngs=rngs)
        self.to_q = linear(channels, channels, config.dtype, rngs)
        self.to_k = linear(channels, channels, config.dtype, rngs)
        self.to_v = linear(channels, channels, config.dtype, rngs)
        self.to_out = nnx.List([linear(channels, channels, config.dtype, rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), num_heads=1)
        return x + self.to_out[0](out).reshape(x.shape)


def _resnet(inputs: int, outputs: int, config: VAEConfig, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(inputs, outputs, config.norm_num_groups, NORM_EPS, config.dtype, rngs=rngs)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(channels, channels, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, config, rngs=rngs)] if config.mid_block_add_attention else [])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownEncoderBlock(nnx.Module):
    """Resnets, then a halving of the resolution unless `last`."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, last: bool, *, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(width, outputs, config, rngs) for width in widths])
        if not last:
            self.downsamplers = nnx.List([Downsample2D(outputs, config.dtype, asymmetric=True, rngs=rngs)])
        self.last = last

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.downsamplers[0](x)


class UpDecoderBlock(nnx.Module):
    """Resnets, then a doubling of the resolution unless `last`."""

    def __init__(self, inputs: int, outputs: int, config: VAEConfig, last: bool, *, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * config.layers_per_block
        self.resnets = nnx.List([_resnet(width, outputs, config, rngs) for width in widths])
        if not last:
            self.upsamplers = nnx.List([Upsample2D(outputs, config.dtype, rngs=rngs)])
        self.last = last

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last else self.upsamplers[0](x)


class Encoder(nnx.Module):
    """Image to the mean and log-variance of its latent."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], 3, config.dtype, rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock(widths[max(i - 1, 0)], width, config, i == len(widths) - 1, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, NORM_EPS, config.dtype, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, config.dtype, rngs)

    def __call__(self, x: Float[Array, "b H W i"]) -> Float[Array, "b h w d"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latent to image."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], 3, config.dtype, rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock(widths[max(i - 1, 0)], width, config, i == len(widths) - 1, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, NORM_EPS, config.dtype, rngs=rngs)
        self.conv_out = narrow_conv(widths[-1], config.out_channels, config.dtype, rngs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class AutoencoderKL(nnx.Module):
    """Encoder and decoder of unscaled latents; images are in [-1, 1], as the published weights expect."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = conv(2 * channels, 2 * channels, 1, config.dtype, rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(channels, channels, 1, config.dtype, rngs)
        self.config = config

    def encode(self, image: Float[Array, "b H W i"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the Gaussian posterior of the unscaled latent, float32."""
        moments = self.encoder(image)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        """Image in about [-1, 1], unclipped, float32."""
        if self.config.use_post_quant_conv:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent).astype(jnp.float32)
