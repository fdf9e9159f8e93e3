"""Inception-v3 as the Frechet Inception Distance uses it: images in [0, 1] to 2048 features."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from megjax.configs import require
from megjax.diffusion import checkpoint
from megjax.diffusion.layers import ShapeRngs
from megjax.precision import EXACT

IMAGE_SIZE, NUM_FEATURES = 299, 2048
RESIZINGS = ("bilinear", "clean")
UNUSED_PARTS = ("fc.", "AuxLogits.")
UNUSED_LEAF = ".num_batches_tracked"

Maps = Float[Array, "b h w c"]


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) by stored statistics, as one multiply-add per element."""

    def __init__(self, channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels, jnp.float32)), nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean, self.var = nnx.Param(jnp.zeros(channels, jnp.float32)), nnx.Param(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Maps) -> Maps:
        slope = self.scale * jax.lax.rsqrt(self.var + 1e-3)
        return x * slope[None, None, None] + (self.bias - self.mean * slope)[None, None, None]


class BasicConv2d(nnx.Module):
    """Convolution without bias, batch normalisation, ReLU; padded by `size // 2`, or not at all where `valid`."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], rngs, *, stride: int = 1, valid=False):
        height, width = size if isinstance(size, tuple) else (size, size)
        padding = "VALID" if valid else ((height // 2, height // 2), (width // 2, width // 2))
        # Exact, lest a Frechet distance depend on the device.
        kernel = (height, width)
        self.conv = nnx.Conv(
            inputs, outputs, kernel, strides=stride, padding=padding, use_bias=False, precision=EXACT, rngs=rngs
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Maps) -> Float[Array, "b h2 w2 c2"]:
        return nnx.relu(self.bn(self.conv(x)))


def max_pool(x: Maps, stride: int) -> Float[Array, "b h2 w2 c"]:
    """3x3 maximum: with stride 2 over whole windows only, with stride 1 keeping the size."""
    return nnx.max_pool(x, (3, 3), strides=(stride, stride), padding="VALID" if stride == 2 else "SAME")


def mean_pool(x: Maps) -> Maps:
    """3x3 mean that keeps the size; at the border it averages only what lies inside, as TensorFlow does."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def chain(x: Maps, *layers: nnx.Module) -> Float[Array, "b h2 w2 c2"]:
    for layer in layers:
        x = layer(x)
    return x


class InceptionA(nnx.Module):
    """1x1, 5x5, double 3x3 and pooled branches: c -> 224 + pooled channels."""

    def __init__(self, inputs: int, pooled: int, rngs: nnx.Rngs):
        self.branch1x1 = BasicConv2d(inputs, 64, 1, rngs)
        self.branch5x5_1 = BasicConv2d(inputs, 48, 1, rngs)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, rngs)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1, rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, rngs)
        self.branch_pool = BasicConv2d(inputs, pooled, 1, rngs)

    def __call__(self, x: Maps) -> Float[Array, "b h w c2"]:
        branches = [
            self.branch1x1(x),
            chain(x, self.branch5x5_1, self.branch5x5_2),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nnx.Module):
    """Halves the grid: 288 -> 768 channels."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3 = BasicConv2d(inputs, 384, 3, rngs, stride=2, valid=True)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1, rngs)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, rngs)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, rngs, stride=2, valid=True)

    def __call__(self, x: Maps) -> Float[Array, "b h2 w2 c2"]:
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([self.branch3x3(x), double, max_pool(x, 2)], axis=-1)


class InceptionC(nnx.Module):
    """7x7 convolutions factored into rows and columns, `narrow` channels wide inside: c -> 768 channels."""

    def __init__(self, inputs: int, narrow: int, rngs: nnx.Rngs):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = BasicConv2d(inputs, 192, 1, rngs)
        self.branch7x7_1 = BasicConv2d(inputs, narrow, 1, rngs)
        self.branch7x7_2 = BasicConv2d(narrow, narrow, row, rngs)
        self.branch7x7_3 = BasicConv2d(narrow, 192, column, rngs)
        self.branch7x7dbl_1 = BasicConv2d(inputs, narrow, 1, rngs)
        self.branch7x7dbl_2 = BasicConv2d(narrow, narrow, column, rngs)
        self.branch7x7dbl_3 = BasicConv2d(narrow, narrow, row, rngs)
        self.branch7x7dbl_4 = BasicConv2d(narrow, narrow, column, rngs)
        self.branch7x7dbl_5 = BasicConv2d(narrow, 192, row, rngs)
        self.branch_pool = BasicConv2d(inputs, 192, 1, rngs)

    def __call__(self, x: Maps) -> Float[Array, "b h w c2"]:
        single = chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return jnp.concatenate([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], axis=-1)


class InceptionD(nnx.Module):
    """Halves the grid: 768 -> 1280 channels."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3_1 = BasicConv2d(inputs, 192, 1, rngs)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, rngs, stride=2, valid=True)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1, rngs)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), rngs)
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), rngs)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, rngs, stride=2, valid=True)

    def __call__(self, x: Maps) -> Float[Array, "b h2 w2 c2"]:
        small = chain(x, self.branch3x3_1, self.branch3x3_2)
        large = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return jnp.concatenate([small, large, max_pool(x, 2)], axis=-1)


class InceptionE(nnx.Module):
    """3x3 convolutions split into a row and a column side by side: c -> 2048 channels."""

    def __init__(self, inputs: int, rngs: nnx.Rngs, *, use_max_pool: bool):
        self.branch1x1 = BasicConv2d(inputs, 320, 1, rngs)
        self.branch3x3_1 = BasicConv2d(inputs, 384, 1, rngs)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), rngs)
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), rngs)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1, rngs)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, rngs)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), rngs)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), rngs)
        self.branch_pool = BasicConv2d(inputs, 192, 1, rngs)
        self.use_max_pool = use_max_pool

    def __call__(self, x: Maps) -> Float[Array, "b h w c2"]:
        single, double = self.branch3x3_1(x), chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(max_pool(x, 1) if self.use_max_pool else mean_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """Inception-v3 up to its last pooling, with the departures of the network that defined FID.

    C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, in the form of the 2015
    TensorFlow graph used by M. Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017: means at
    borders leave the padding out, and the last block pools by maximum. Attributes are named as in PyTorch's
    `torchvision.models.inception_v3`. A distance is FID only with that graph's weights (in PyTorch form known as
    `pt_inception-2015-12-05`), which are not bundled: `load` reads them from the user's file. The ImageNet weights of
    torchvision also load, but are other weights and give other distances.

    `resizing`, one of `RESIZINGS`, is how images come to 299x299, which moves a FID by as much as methods differ:

    - "bilinear": as in the original FID and pytorch-fid, without a low-pass filter when shrinking.
    - "clean": bicubic with one, as in clean-fid (G. Parmar et al., "On aliased resizing and surprising subtleties in
      GAN evaluation", CVPR 2022).

    ValueError for another one.
    """

    def __init__(self, rngs: nnx.Rngs, resizing: str = "bilinear"):
        require(resizing in RESIZINGS, "resizing", resizing, f"one of {RESIZINGS}")
        self.resizing = resizing
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, rngs, stride=2, valid=True)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, rngs, valid=True)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1, rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, rngs, valid=True)
        self.Mixed_5b = InceptionA(192, 32, rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs)
        self.Mixed_6a = InceptionB(288, rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs)
        self.Mixed_7a = InceptionD(768, rngs)
        self.Mixed_7b = InceptionE(1280, rngs, use_max_pool=False)
        self.Mixed_7c = InceptionE(2048, rngs, use_max_pool=True)

    def features(self, images: Array | np.ndarray) -> Float[Array, "b 2048"]:
        """Features [b 2048] for Frechet and kernel distances of images [b h w 3] in [0, 1], of any size.

        Float32 whatever the images are; wrap in `nnx.jit` to compile. Raises ValueError for another shape, and for
        integer images, whose range would be [0, 255].
        """
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(f"images has shape {images.shape}; it must be [b h w 3], RGB and channels last")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images has dtype {images.dtype}; it must be floating, with values in [0, 1]")
        x = 2 * resize(jnp.asarray(images, jnp.float32), self.resizing) - 1
        x = max_pool(chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3), 2)
        x = max_pool(chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3), 2)
        x = chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        x = chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        return chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c).mean((1, 2))

    def __call__(self, images: Array | np.ndarray) -> Float[Array, "b 2048"]:
        """`features`, as SceneNet's features come from a call."""
        return self.features(images)

    @classmethod
    def load(cls, path: str | Path, resizing: str = "bilinear") -> "Inception":
        """The network with the weights of the safetensors file `path`, under their PyTorch state-dict names.

        The classifier (`fc`), `AuxLogits` and `num_batches_tracked` are skipped. Raises ValueError for a file that is
        absent, damaged or pickled, or listing every missing, extra and mis-shaped tensor at once.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist or is not a file; it must be a safetensors file")
        if path.suffix in checkpoint.PICKLES:
            raise ValueError(
                f"{path} is a pickle, which is refused because loading one can run any code; convert it where you "
                "trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'inception.safetensors')"
            )
        return nnx.merge(*checkpoint.load_params(lambda: cls(ShapeRngs(), resizing), [path], rename=_kept_name))


def resize(images: Float[Array, "b h w c"], resizing: str = "bilinear") -> Float[Array, "b 299 299 c"]:
    """Images in [0, 1] at the size of the network, by one of `RESIZINGS`; half-pixel centres both.

    "bilinear" repeats borders and has no low-pass filter when shrinking (PyTorch's `interpolate`); "clean" is Pillow's
    bicubic filter, widened when shrinking, and clipped to [0, 1].
    """
    shape = (images.shape[0], IMAGE_SIZE, IMAGE_SIZE, images.shape[3])
    if resizing == "clean":
        # Its products are matrices' too, exact lest a distance depend on the device.
        return jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True, precision=EXACT), 0, 1)
    return jax.image.resize(images, shape, "bilinear", antialias=False)


def _kept_name(name: str) -> str | None:
    """The name of a tensor that the features need; None for any other."""
    return None if name.startswith(UNUSED_PARTS) or name.endswith(UNUSED_LEAF) else name
