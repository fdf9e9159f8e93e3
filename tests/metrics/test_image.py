"""Tests of PSNR and SSIM against direct NumPy/SciPy evaluation of their definitions."""

import jax
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from megjax.metrics import psnr, ssim

pytestmark = pytest.mark.usefixtures("fast_compile")
SHAPE = (24, 19, 3)
METRICS = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}


def image_pair(seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    image = rng.uniform(size=SHAPE)
    noisy = np.clip(image + noise * rng.normal(size=SHAPE), 0, 1)
    return image.astype(np.float32), noisy.astype(np.float32)


def ssim_by_definition(x, y):
    """Wang et al. 2004 in float64: every channel, Gaussian weights, valid positions only."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(values):
        return correlate1d(correlate1d(values, window, axis=0), window, axis=1)[5:-5, 5:-5]

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * cov + 0.03**2)
    return np.mean(numerator / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2)))


def test_psnr_hand_computed():
    black = np.zeros((4, 4, 3), np.float32)
    one = black.copy()
    one[0, 0, 0] = 1
    values = [METRICS["psnr"](black, other) for other in (black + np.float32(0.1), one, black)]
    np.testing.assert_allclose(values, [20.0, 10 * np.log10(black.size), np.inf], rtol=1e-6)  # MSE 0.01, 1 / size, 0
    assert values[0].shape == ()


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_matches_its_definition(noise):
    image, noisy = image_pair(noise=noise)
    np.testing.assert_allclose(METRICS["ssim"](image, noisy), ssim_by_definition(image, noisy), atol=2e-5)


def test_ssim_limits():
    image, _ = image_pair()
    np.testing.assert_allclose(METRICS["ssim"](image, image), 1.0, atol=1e-6)
    flat = np.full(SHAPE, 0.25, np.float32)
    # Constant images differ in luminance only: (2 a b + C1) / (a^2 + b^2 + C1).
    np.testing.assert_allclose(METRICS["ssim"](flat, 2 * flat), (0.25 + 1e-4) / (0.3125 + 1e-4), rtol=1e-4)
    with pytest.raises(ValueError, match=r"reference has shape \(10, 12, 3\)"):
        METRICS["ssim"](image[:10, :12], image[:10, :12])


@pytest.mark.parametrize("name", METRICS)
def test_vmap_jit_and_gradients(name):
    pairs = [image_pair(seed) for seed in range(3)]
    mapped = jax.jit(jax.vmap(METRICS[name]))(*map(np.stack, zip(*pairs, strict=True)))
    np.testing.assert_allclose(mapped, [METRICS[name](*pair) for pair in pairs], rtol=1e-5)
    gradient = jax.jit(jax.grad(METRICS[name], argnums=1))(*pairs[0])
    assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)


@pytest.mark.parametrize("name", METRICS)
def test_what_is_no_pair_of_images_is_refused(name, unchecked):
    image, noisy = image_pair()
    refused = {
        r"reference's shape is \(1, 24, 19, 3\)": (image[None], noisy[None]),
        r"image's shape is \(24, 19, 3\); it must be the reference's, \(24, 19, 1\)": (image[..., :1], noisy),
        "reference's type is 'uint8'; it must be real": ((255 * image).astype(np.uint8), noisy),
        "image's type is 'int32'": (image, (255 * noisy).astype(np.int32)),
    }
    for message, pair in refused.items():
        for metric in (METRICS[name], {"psnr": psnr, "ssim": ssim}[name]):
            with pytest.raises(ValueError, match=message):
                metric(*pair)
