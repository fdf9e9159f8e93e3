"""Layers shared by the U-Net, the VAE and the text encoder, channels-last, named as in the diffusers state dict."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.diffusion import strips
from megjax.diffusion.winograd import pad, winograd
from megjax.precision import LayerNorm


class Identity(nnx.Module):
    """Holds the place of a parameterless layer, so that list indices agree with the state dict."""

    def __call__(self, x):
        return x


class ShapeRngs(nnx.Rngs):
    """Stands in for `nnx.Rngs` under `eval_shape`, where only shapes count: every key is the same.

    The counter of `nnx.Rngs` makes tracing quadratic in the number of tensors, felt at Stable Diffusion's size.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


class GroupNorm(nnx.Module):
    """Group normalisation over [b h w c] (Wu and He 2018), in float32, as one multiply-add per element.

    Moments are taken per channel and merged per group, so that the full-size array is read once for the moments and
    once for the result, which is faster on CPU than reshaping to groups.
    """

    def __init__(self, channels: int, num_groups: int, eps: float, dtype=jnp.float32, *, rngs: nnx.Rngs):
        if channels % num_groups:
            raise ValueError(f"norm_num_groups is {num_groups}; it must divide the {channels} channels it normalises")
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.num_groups, self.eps, self.dtype = num_groups, eps, dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        return self.apply(x, *self.line(x))

    def line(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
        """Slope and offset of the multiply-add that normalises `x`, float32."""
        batch, _, _, channels = x.shape
        per_group = channels // self.num_groups
        x = x.astype(jnp.float32)
        mean = x.mean((1, 2)).reshape(batch, self.num_groups, per_group).mean(-1)
        square = jnp.square(x).mean((1, 2)).reshape(batch, self.num_groups, per_group).mean(-1)
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.eps)
        scale, bias = (value[None].astype(jnp.float32) for value in (self.scale, self.bias))
        slope = jnp.repeat(inverse, per_group, axis=1) * scale
        return slope, bias - jnp.repeat(mean, per_group, axis=1) * slope

    def apply(
        self, x: Float[Array, "b h w c"], slope: Float[Array, "b c"], offset: Float[Array, "b c"]
    ) -> Float[Array, "b h w c"]:
        """The multiply-add."""
        return (x.astype(jnp.float32) * slope[:, None, None] + offset[:, None, None]).astype(self.dtype)


def conv(inputs: int, outputs: int, size: int, dtype, rngs: nnx.Rngs, *, stride: int = 1, padding=None) -> nnx.Conv:
    """A square 2-D convolution with PyTorch's symmetric `size // 2` padding unless `padding` says otherwise."""
    pad = ((size // 2, size // 2),) * 2 if padding is None else padding
    kind = Conv3x3 if size == 3 and stride == 1 and padding is None else nnx.Conv
    return kind(inputs, outputs, (size, size), strides=stride, padding=pad, dtype=dtype, rngs=rngs)


class Conv3x3(nnx.Conv):
    """A 3x3 convolution with stride 1 and "same" padding; on a CPU, whichever way of computing it is the fastest.

    In float32 that is Winograd's from `WINOGRAD_CHANNELS` on while its tiles stay in the caches, and from
    `PRODUCT_CHANNELS` on always; many channels of few pixels are one product of gathered windows.
    """

    def __call__(self, x: Float[Array, "b h w i"], pad_rows: bool = True) -> Float[Array, "b h2 w o"]:
        """Without `pad_rows` there are two rows less."""
        kernel, bias = (value[...].astype(self.dtype) for value in (self.kernel, self.bias))
        return conv3x3(x.astype(self.dtype), kernel, pad_rows) + bias[None, None, None]


WINOGRAD_CHANNELS, PRODUCT_CHANNELS = 64, 256
"""Fewest channels, of input and output, for Winograd's convolution; for tiles larger than the caches."""
_TILE_BYTES = 2**24
_FEW_PIXELS, _DEEP, _DEEPER = 64, 512, 1024


def conv3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], pad_rows: bool = True
) -> Float[Array, "b h2 w o"]:
    """The convolution of `Conv3x3` without its bias."""
    fewest = min(kernel.shape[2:])
    if x.shape[1] * x.shape[2] <= _FEW_PIXELS and kernel.shape[2] >= _DEEP:
        on_cpu = _one_product
    elif x.dtype == jnp.float32 and fewest >= (WINOGRAD_CHANNELS if 16 * x.size <= _TILE_BYTES else PRODUCT_CHANNELS):
        on_cpu = winograd
    else:
        return _convolve(x, kernel, pad_rows)
    return _on_cpu(on_cpu, x, kernel, pad_rows)


def _on_cpu(way, x, kernel, pad_rows):
    """A 3x3 convolution that a CPU computes in this way."""
    cpu, default = (partial(fn, pad_rows=pad_rows) for fn in (way, _convolve))
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _one_product(x, kernel, pad_rows=True):
    padded = pad(x, pad_rows)
    height, width, channels = padded.shape[1] - 2, *x.shape[2:]
    windows = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(9 * channels, -1)


class NarrowConv(nnx.Conv):
    """A 3x3 convolution to few channels, "same" padding: on a CPU one product for all taps, which are then added.

    XLA:CPU's convolution does as much work for three output channels as for eight.
    """

    def __call__(self, x: Float[Array, "b h w i"], pad_rows: bool = True) -> Float[Array, "b h2 w o"]:
        """Without `pad_rows` there are two rows less."""
        kernel, bias = (value[...].astype(self.dtype) for value in (self.kernel, self.bias))
        return _on_cpu(_added_taps, x.astype(self.dtype), kernel, pad_rows) + bias[None, None, None]


def _convolve(x, kernel, pad_rows=True):
    numbers = ("NHWC", "HWIO", "NHWC")
    padding = ((int(pad_rows),) * 2, (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)


def _added_taps(x, kernel, pad_rows=True):
    taps = x @ kernel.transpose(2, 0, 1, 3).reshape(x.shape[-1], -1)
    taps = pad(taps, pad_rows)
    height, width = taps.shape[1] - 2, x.shape[2]
    taps = taps.reshape(*taps.shape[:3], 3, 3, -1)
    return sum(taps[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))


def narrow_conv(inputs: int, outputs: int, dtype, rngs: nnx.Rngs) -> NarrowConv:
    """A 3x3 convolution to few channels."""
    return NarrowConv(inputs, outputs, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)


def linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, *, use_bias: bool = True) -> nnx.Linear:
    """A dense layer with float32 parameters and `dtype` activations."""
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)


def layer_norm(features: int, eps: float, dtype, rngs: nnx.Rngs) -> LayerNorm:
    """Layer normalisation; its moments are float32 whatever `dtype` is."""
    return LayerNorm(features, epsilon=eps, dtype=dtype, rngs=rngs)


def norm_silu_conv(norm: GroupNorm, conv: Conv3x3 | NarrowConv, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
    """conv(silu(norm(x))); on a CPU large features need no memory for the normalised ones."""

    def by_strips(x):
        line = norm.line(x)

        def prepare(rows, image):
            of_image = [jax.lax.dynamic_slice_in_dim(value, image, 1) for value in line]
            return nnx.silu(norm.apply(rows, *of_image))

        return strips.in_strips(lambda rows: conv(rows, pad_rows=False), x, prepare)

    def whole(x):
        return conv(nnx.silu(norm(x)))

    return jax.lax.platform_dependent(x, cpu=by_strips, default=whole) if strips.pay(x) else whole(x)


class ResnetBlock2D(nnx.Module):
    """Two normalised convolutions with a residual; `time_dim` adds a projection of the time embedding between them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_groups: int,
        eps: float,
        dtype,
        *,
        time_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(inputs, num_groups, eps, dtype, rngs=rngs)
        self.conv1 = conv(inputs, outputs, 3, dtype, rngs)
        if time_dim is not None:
            self.time_emb_proj = linear(time_dim, outputs, dtype, rngs)
        self.norm2 = GroupNorm(outputs, num_groups, eps, dtype, rngs=rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, dtype, rngs)
        self.has_shortcut = inputs != outputs

    def shift(self, time: Float[Array, "n e"]) -> Float[Array, "n d"]:
        """What embedded timesteps add to every pixel between the convolutions."""
        return self.time_emb_proj(nnx.silu(time))

    def __call__(
        self, x: Float[Array, "b h w c"], shift: Float[Array, "#b d"] | None = None
    ) -> Float[Array, "b h w d"]:
        y = norm_silu_conv(self.norm1, self.conv1, x)
        if shift is not None:
            y = y + shift[:, None, None]
        y = norm_silu_conv(self.norm2, self.conv2, y)
        return y + (self.conv_shortcut(x) if self.has_shortcut else x)


class Downsample2D(nnx.Module):
    """Halves height and width by a strided convolution; `asymmetric` pads bottom and right only, as the VAE does."""

    def __init__(self, channels: int, dtype, *, asymmetric: bool = False, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if asymmetric else None
        self.conv = conv(channels, channels, 3, dtype, rngs, stride=2, padding=padding)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour upsampling to `size` (default: twice the input), then a convolution.

    On a CPU the two are one where the size doubles, as at most four input pixels of a 3x3 window are different, unless
    channels are so many that summing the kernel's taps takes too long.
    """

    def __init__(self, channels: int, dtype, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        if size is None or size == (2 * x.shape[1], 2 * x.shape[2]):
            kernel, bias = (value[...].astype(self.conv.dtype) for value in (self.conv.kernel, self.conv.bias))
            return double(x.astype(self.conv.dtype), kernel, bias)
        for axis in (1, 2):
            length, target = x.shape[axis], size[axis - 1]
            x = jnp.take(x, jnp.arange(target) * length // target, axis=axis)
        return self.conv(x)


def double(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], bias: Float[Array, " o"]
) -> Float[Array, "b h2 w2 o"]:
    """Doubling and convolution of `Upsample2D`."""
    whole = _double_by_phases if x.shape[-1] < _DEEPER or x.dtype != jnp.float32 else _double_and_convolve
    if whole is _double_and_convolve or not strips.pay(x, 4):
        return jax.lax.platform_dependent(x, kernel, cpu=whole, default=_double) + bias[None, None, None]

    def default(x, kernel, bias):
        return _double(x, kernel) + bias[None, None, None]

    return jax.lax.platform_dependent(x, kernel, bias, cpu=_double_by_strips, default=default)


def _phase_sums(kernel, axis: int):
    """Taps [2 along axis] of output pixels 2i and of 2i + 1: two of the kernel's three see the same input pixel."""
    first, second, third = jnp.split(kernel, 3, axis=axis)
    even = jnp.concatenate([first, second + third], axis=axis)
    return even, jnp.concatenate([first + second, third], axis=axis)


def _repeat(x):
    """Every pixel twice along both axes, by one broadcast: two would write the array between them to memory."""
    batch, height, width, channels = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels)).reshape(
        batch, 2 * height, 2 * width, channels
    )


def _double(x, kernel):
    return _convolve(_repeat(x), kernel)


def _double_and_convolve(x, kernel):
    return conv3x3(_repeat(x), kernel)


def _double_by_phases(x, kernel):
    """Four 2x2 convolutions, one for each place of an output pixel over its input pixel, done as one: 4/9 of the work.

    As W. Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016, have it for subpixels.
    """
    return _phases(x, _phase_taps(kernel))


def _double_by_strips(x, kernel, bias):
    taps = _phase_taps(kernel)

    def doubled(rows):
        return _phases(rows, taps, pad_rows=False) + bias[None, None, None]

    return strips.in_strips(doubled, x, lambda rows, image: rows)


def _phase_taps(kernel):
    taps = [_phase_sums(row, 1) for row in _phase_sums(kernel, 0)]
    return jnp.concatenate([taps[a][b] for a in (0, 1) for b in (0, 1)], -1)


def _phases(x, taps, pad_rows=True):
    numbers = ("NHWC", "HWIO", "NHWC")
    padding = ((int(pad_rows),) * 2, (1, 1))
    found = jax.lax.conv_general_dilated(x, taps, (1, 1), padding, dimension_numbers=numbers)
    batch, height, width = found.shape[0], found.shape[1] - 1, x.shape[2]
    found = found.reshape(batch, height + 1, width + 1, 2, 2, -1)
    rows = []
    for a in (0, 1):
        pair = [found[:, a : a + height, b : b + width, a, b] for b in (0, 1)]
        rows.append(jnp.stack(pair, axis=3).reshape(batch, height, 2 * width, -1))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)
