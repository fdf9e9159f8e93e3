"""The U-Net's spatial transformer: self-attention, cross-attention to text and a gated MLP over pixels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.diffusion.attention import attend
from megjax.diffusion.layers import GroupNorm, Identity, conv, layer_norm, linear

GROUP_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5

KeysAndValues = tuple[Float[Array, "_ _ _"], Float[Array, "_ _ _"]]
"""Of one attention, [b l d] each."""


class CrossAttention(nnx.Module):
    """Multi-head attention from pixels to a text, by its keys and values, or to the pixels themselves."""

    def __init__(self, width: int, context_width: int, num_heads: int, upcast: bool, dtype, *, rngs: nnx.Rngs):
        self.to_q = linear(width, width, dtype, rngs, use_bias=False)
        self.to_k = linear(context_width, width, dtype, rngs, use_bias=False)
        self.to_v = linear(context_width, width, dtype, rngs, use_bias=False)
        self.to_out = nnx.List([linear(width, width, dtype, rngs)])
        self.num_heads, self.upcast = num_heads, upcast

    def keys_and_values(self, context: Float[Array, "b l e"]) -> KeysAndValues:
        """What is attended to; of a text the same at every denoising step."""
        return self.to_k(context), self.to_v(context)

    def __call__(self, x: Float[Array, "b n d"], text: KeysAndValues | None = None) -> Float[Array, "b n d"]:
        query, (key, value) = self.to_q(x), self.keys_and_values(x) if text is None else text
        return self.to_out[0](attend(query, key, value, self.num_heads, upcast=self.upcast))


class GEGLU(nnx.Module):
    """Linear layer gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, dtype, *, rngs: nnx.Rngs):
        self.proj = linear(width, 2 * inner, dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU, (dropout,) linear; the list is indexed as in the state dict."""

    def __init__(self, width: int, dtype, *, rngs: nnx.Rngs):
        inner = 4 * width
        self.net = nnx.List([GEGLU(width, inner, dtype, rngs=rngs), Identity(), linear(inner, width, dtype, rngs)])

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each pre-normalised with a residual."""

    def __init__(self, width: int, context_width: int, num_heads: int, upcast: bool, dtype, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, LAYER_NORM_EPS, dtype, rngs)
        self.attn1 = CrossAttention(width, width, num_heads, upcast, dtype, rngs=rngs)
        self.norm2 = layer_norm(width, LAYER_NORM_EPS, dtype, rngs)
        self.attn2 = CrossAttention(width, context_width, num_heads, upcast, dtype, rngs=rngs)
        self.norm3 = layer_norm(width, LAYER_NORM_EPS, dtype, rngs)
        self.ff = FeedForward(width, dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], text: KeysAndValues) -> Float[Array, "b n d"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, with a residual.

    `use_linear` makes the projections dense layers (Stable Diffusion 2) instead of 1x1 convolutions; their weights have
    other shapes in a checkpoint, their arithmetic is the same.
    """

    def __init__(
        self,
        channels: int,
        context_width: int,
        num_heads: int,
        num_layers: int,
        num_groups: int,
        use_linear: bool,
        upcast: bool,
        dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, num_groups, GROUP_NORM_EPS, dtype, rngs=rngs)

        def project():
            return linear(channels, channels, dtype, rngs) if use_linear else conv(channels, channels, 1, dtype, rngs)

        self.proj_in = project()
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, context_width, num_heads, upcast, dtype, rngs=rngs)
                for _ in range(num_layers)
            ]
        )
        self.proj_out = project()

    def keys_and_values(self, context: Float[Array, "b l e"]) -> list[KeysAndValues]:
        """Of a text, for each block."""
        return [block.attn2.keys_and_values(context) for block in self.transformer_blocks]

    def __call__(self, x: Float[Array, "b h w c"], text: list[KeysAndValues]) -> Float[Array, "b h w c"]:
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block, attended in zip(self.transformer_blocks, text, strict=True):
            tokens = block(tokens, attended)
        return x + self.proj_out(tokens.reshape(x.shape))
