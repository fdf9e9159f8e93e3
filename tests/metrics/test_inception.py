"""Inception-v3 against PyTorch with random weights, its resizing, and strict loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from megjax.diffusion.layers import ShapeRngs
from megjax.metrics import Inception, inception
from megjax.precision import EXACT
from tests.products import products

PARITY = 1e-4


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs, outputs, size, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Named units; `wiring` lists the branches, each a list of names, "+" splitting the last units side by side."""

    def __init__(self, units, wiring, pool):
        super().__init__()
        for name, arguments in units.items():
            setattr(self, name, Unit(*arguments))
        self.wiring, self.pool = wiring, pool

    def forward(self, x):
        outputs = []
        for branch in self.wiring:
            y = x
            for name in branch.split():
                if "+" in name:
                    y = torch.cat([getattr(self, part)(y) for part in name.split("+")], 1)
                else:
                    y = self.pool(y) if name == "pool" else getattr(self, name)(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def mean_3x3(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_3x3(x):
    return F.max_pool2d(x, 3, 1, 1)


def halve(x):
    return F.max_pool2d(x, 3, 2)


def block_a(c, pooled):
    units = {
        "branch1x1": (c, 64, 1),
        "branch5x5_1": (c, 48, 1),
        "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (c, 64, 1),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (c, pooled, 1),
    }
    double = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    return Branches(units, ["branch1x1", "branch5x5_1 branch5x5_2", double, "pool branch_pool"], mean_3x3)


def block_b(c):
    units = {
        "branch3x3": (c, 384, 3, 2),
        "branch3x3dbl_1": (c, 64, 1),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 2),
    }
    return Branches(units, ["branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "pool"], halve)


def block_c(c, n):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    units = {
        "branch1x1": (c, 192, 1),
        "branch7x7_1": (c, n, 1),
        "branch7x7_2": (n, n, *row),
        "branch7x7_3": (n, 192, *column),
        "branch7x7dbl_1": (c, n, 1),
        "branch7x7dbl_2": (n, n, *column),
        "branch7x7dbl_3": (n, n, *row),
        "branch7x7dbl_4": (n, n, *column),
        "branch7x7dbl_5": (n, 192, *row),
        "branch_pool": (c, 192, 1),
    }
    single = " ".join(f"branch7x7_{i}" for i in (1, 2, 3))
    double = " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
    return Branches(units, ["branch1x1", single, double, "pool branch_pool"], mean_3x3)


def block_d(c):
    units = {
        "branch3x3_1": (c, 192, 1),
        "branch3x3_2": (192, 320, 3, 2),
        "branch7x7x3_1": (c, 192, 1),
        "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
        "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)),
        "branch7x7x3_4": (192, 192, 3, 2),
    }
    large = " ".join(f"branch7x7x3_{i}" for i in range(1, 5))
    return Branches(units, ["branch3x3_1 branch3x3_2", large, "pool"], halve)


def block_e(c, pool):
    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    units = {
        "branch1x1": (c, 320, 1),
        "branch3x3_1": (c, 384, 1),
        "branch3x3_2a": (384, 384, *row),
        "branch3x3_2b": (384, 384, *column),
        "branch3x3dbl_1": (c, 448, 1),
        "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": (384, 384, *row),
        "branch3x3dbl_3b": (384, 384, *column),
        "branch_pool": (c, 192, 1),
    }
    single = "branch3x3_1 branch3x3_2a+branch3x3_2b"
    double = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a+branch3x3dbl_3b"
    return Branches(units, ["branch1x1", single, double, "pool branch_pool"], pool)


class Reference(nn.Module):
    """The FID network in PyTorch; `Pool` steps have no weights and so no place in the state dict."""

    def __init__(self):
        super().__init__()
        layers = {
            "Conv2d_1a_3x3": Unit(3, 32, 3, 2),
            "Conv2d_2a_3x3": Unit(32, 32, 3),
            "Conv2d_2b_3x3": Unit(32, 64, 3, 1, 1),
            "pool_1": nn.MaxPool2d(3, 2),
            "Conv2d_3b_1x1": Unit(64, 80, 1),
            "Conv2d_4a_3x3": Unit(80, 192, 3),
            "pool_2": nn.MaxPool2d(3, 2),
            "Mixed_5b": block_a(192, 32),
            "Mixed_5c": block_a(256, 64),
            "Mixed_5d": block_a(288, 64),
            "Mixed_6a": block_b(288),
            "Mixed_6b": block_c(768, 128),
            "Mixed_6c": block_c(768, 160),
            "Mixed_6d": block_c(768, 160),
            "Mixed_6e": block_c(768, 192),
            "Mixed_7a": block_d(768),
            "Mixed_7b": block_e(1280, mean_3x3),
            "Mixed_7c": block_e(2048, max_3x3),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images):
        x = 2 * torch_resize(images) - 1
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


def torch_resize(images):
    return F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)


def randomise(model):
    """He-scaled kernels and random statistics, so that features stay near 1 through the depth."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.7, 1.4, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(0, 0.2, generator=generator)
    return model.eval()


def random_images(seed, shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile", "unchecked")
def test_features_equal_pytorch(tmp_path):
    """From a file that also holds those tensors of a full classifier that are not needed."""
    reference = randomise(Reference())
    unused = {"fc.weight": torch.zeros(4, 2048), "AuxLogits.conv0.conv.weight": torch.zeros(1)}
    save_file(reference.state_dict() | unused, tmp_path / "inception.safetensors")
    images = random_images(0, (2, 64, 64, 3)) ** np.array([0.5, 1.0, 2.0], np.float32)
    images[1] *= np.linspace(0, 1, 64, dtype=np.float32)[:, np.newaxis, np.newaxis]
    with torch.no_grad():
        expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    model = Inception.load(tmp_path / "inception.safetensors")
    features = np.asarray(nnx.jit(Inception.features)(model, images))
    assert features.shape == (2, 2048) and features.dtype == np.float32
    assert 0.1 < np.std(expected) < 10  # else the tolerance would mean nothing
    assert np.max(np.abs(features - expected)) <= PARITY


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (400, 301), (613, 17), (1, 1)])
def test_resizing_equals_pytorch(size):
    images = random_images(1, (1, *size, 3))
    expected = torch_resize(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jax.jit(inception.resize)(images), expected, atol=PARITY)


@pytest.mark.parametrize("size", [(64, 64), (400, 301)])
def test_clean_resizing_equals_pillow(size):
    """As clean-fid does it: every channel in floating point by Pillow's bicubic filter, clipped."""
    images = np.round(random_images(1, (1, *size, 3)))  # black and white pixels, where the filter overshoots
    channels = [Image.fromarray(np.ascontiguousarray(images[0, ..., c], np.float32)) for c in range(3)]
    channels = [channel.resize((299, 299), Image.BICUBIC) for channel in channels]
    expected = np.clip(np.stack([np.asarray(c) for c in channels], axis=-1), 0, 1)[None]
    resized = jax.jit(lambda x: inception.resize(x, "clean"))(images)
    # Places up to 400 pixels are known to 400 2^-24 = 2e-5 pixels in float32, and the filter's slope is up to 2.
    np.testing.assert_allclose(resized, expected, atol=5e-5)
    assert np.abs(resized - jax.jit(inception.resize)(images)).max() > 0.1
    with pytest.raises(ValueError, match="resizing is 'lanczos'; it must be one of"):
        nnx.eval_shape(lambda: Inception(nnx.Rngs(0), "lanczos"))


@pytest.fixture(scope="module")
def shapes():
    """The network without its numbers."""
    return nnx.eval_shape(lambda: Inception(ShapeRngs()))


def test_number_of_parameters_and_shape_of_the_features(shapes):
    # torchvision's inception_v3 has 27,161,264, of which 3,326,696 in AuxLogits and 2,049,000 in fc.
    sizes = {path: leaf.size for path, leaf in nnx.to_flat_state(nnx.state(shapes)) if path[-1] not in ("mean", "var")}
    assert sum(sizes.values()) == 27_161_264 - 3_326_696 - 2_049_000
    features = nnx.eval_shape(Inception.features, shapes, jax.ShapeDtypeStruct((2, 64, 48, 3), jnp.float16))
    assert features.shape == (2, 2048) and features.dtype == jnp.float32


def test_every_mismatch_is_listed(shapes, tmp_path):
    tensors = {
        "Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 3), np.float32),
        "Conv2d_1a_3x3.bn.bias": np.zeros(32, np.float32),
        "Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(1, np.int32),
        "fc.weight": np.zeros((4, 2048), np.float32),
        "Mixed_5b.branch1x1.conv.weight": np.zeros((64, 3, 1, 1), np.float32),
        "Mixed_7c.branch_pool.bn.running_var": np.zeros(5, np.float32),
        "Mixed_8.weight": np.zeros(1, np.float32),
    }
    save_arrays(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as error:
        Inception.load(tmp_path / "other.safetensors")
    message = str(error.value)
    for part in (
        "missing Conv2d_1a_3x3.bn.running_mean;",
        "Mixed_5b.branch1x1.conv.weight has shape (64, 3, 1, 1), expected (64, 192, 1, 1)",
        "Mixed_7c.branch_pool.bn.running_var has shape (5,), expected (192,)",
        "extra Mixed_8.weight",
    ):
        assert part in message
    # Of the file's tensors two fit, two have other shapes, and one belongs nowhere.
    num_tensors = len(nnx.to_flat_state(nnx.state(shapes)))
    assert message.count("missing ") == num_tensors - 4 and message.count(";") == num_tensors - 4 + 2
    assert "\n" not in message


def test_unusable_files(tmp_path):
    pickle, damaged = tmp_path / "inception.pth", tmp_path / "inception.safetensors"
    pickle.write_bytes(b"\x80\x04")
    damaged.write_bytes(b"\x08\x00\x00")
    for path, message in (
        (pickle, "is a pickle.*save_file"),
        (damaged, "not a whole safetensors file"),
        (tmp_path / "absent.safetensors", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            Inception.load(path)


def test_bad_images(shapes):
    for images, name in (
        (np.zeros((2, 3, 64, 64), np.float32), "shape"),
        (np.zeros((64, 64, 3), np.float32), "shape"),
        (np.zeros((0, 64, 64, 3), np.float32), "shape"),
        (np.zeros((2, 64, 64, 3), np.uint8), "dtype"),
    ):
        with pytest.raises(ValueError, match=f"images has {name}"):
            shapes.features(images)


def test_its_products_are_exact():
    graph, state = nnx.split(nnx.eval_shape(lambda: inception.BasicConv2d(3, 8, 3, ShapeRngs())))
    found = products(lambda state, x: nnx.merge(graph, state)(inception.resize(x)), state, jnp.zeros((1, 64, 64, 3)))
    assert len(found) == 3 and {product.precision for product in found} == {(EXACT, EXACT)}
