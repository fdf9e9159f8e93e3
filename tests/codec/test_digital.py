"""Tests of the digital seed against theory of quantised Gaussians, brute force, and Gaussian OPTA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from megjax.codec.digital import choose_step, expected_nmse, fit_digital, quantise
from megjax.codec.linear import latent_statistics
from megjax.codec.opta import gaussian_distortion
from tests.checks import STANDARD_ERRORS
from tests.products import inexact_products

COUNT = 8000
SCALES = np.geomspace(3, 0.1, 12)
DECODE = jax.jit(jax.vmap(quantise, (None, None, 0, None)))
CHOOSE = jax.jit(lambda digital, capacities: (expected_nmse(digital, capacities), choose_step(digital, capacities)))


def make_latents(seed):
    """Gaussian latents [n 2 3 2] of twelve variances over three decades, in one basis."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(99)
    basis = np.linalg.qr(same.normal(size=(12, 12)))[0]
    return (0.7 + (rng.normal(size=(COUNT, 12)) * SCALES) @ basis.T).reshape(COUNT, 2, 3, 2)


LATENTS = make_latents(0)
STATISTICS = latent_statistics(LATENTS)


@pytest.fixture(scope="module")
def digital():
    return fit_digital(STATISTICS, LATENTS, num_steps=24)


@pytest.fixture(scope="module")
def decode(digital):
    """Latents as decoded at a step: NumPy, one compiled program."""
    return lambda latents, index: np.asarray(DECODE(digital, STATISTICS, latents.astype(np.float32), index))


@pytest.mark.parametrize("law", [stats.norm(), stats.laplace()], ids=["gaussian", "laplacian"])
@pytest.mark.parametrize("rounding", [0.0, 0.5])
def test_entropy_and_error_of_one_coefficient(law, rounding):
    count = 20_000
    latents = law.rvs(count, random_state=np.random.default_rng(1)).reshape(count, 1, 1, 1)
    digital = fit_digital(latent_statistics(latents), latents, num_steps=7, rounding=rounding)
    for step, bits in zip(np.asarray(digital.steps)[1:], np.asarray(digital.bits)[1:], strict=True):
        edges = np.arange(1, 2000) * step - rounding * step
        tails = law.sf(edges)[:-1] - law.sf(edges)[1:]
        bins = np.concatenate([[1 - 2 * law.sf(edges[0])], tails, tails])
        bins = bins[bins > 0]
        entropy = -np.sum(bins * np.log2(bins))
        spread = np.sqrt(np.sum(bins * np.log2(bins) ** 2) - entropy**2)
        # The empirical entropy falls short by some (bins - 1) / (2 count) nats: G. A. Miller, 1955.
        bias = np.sum(bins * count > 0.1) / (2 * count * np.log(2))
        assert abs(bits - entropy) <= STANDARD_ERRORS * spread / np.sqrt(count) + 2 * bias
    if rounding == 0.5:
        # Fine steps: the differential entropy h - log2(step), but for terms of order step^2, and step^2 / 12.
        step = float(digital.steps[-1])
        assert abs(entropy - (law.entropy() / np.log(2) - np.log2(step))) < step**2
        np.testing.assert_allclose(
            digital.nmse[-1] * latents.var(), step**2 / 12, rtol=STANDARD_ERRORS / np.sqrt(count)
        )


def test_tables(digital):
    assert digital.bits.shape == digital.nmse.shape == digital.steps.shape == (25,)
    assert digital.bits[0] == 0 and digital.nmse[0] == 1
    assert np.all(np.diff(digital.bits) > 0) and np.all(np.diff(digital.nmse) < 0)
    assert np.all(np.diff(digital.steps) < 0)


def test_quantised_training_latents_have_the_tables_error(digital, decode):
    for index in (0, 1, 8, 16, 24):
        error = np.mean(np.sum((decode(LATENTS, index) - LATENTS) ** 2, axis=(1, 2, 3)))
        # The float32 receiver may put a few coefficients that lie on an edge into the bin next to it.
        np.testing.assert_allclose(error / STATISTICS.total_variance, digital.nmse[index], rtol=1e-3)
    np.testing.assert_allclose(decode(LATENTS, 0)[0].reshape(-1), STATISTICS.mean, rtol=1e-6)


@pytest.mark.parametrize("index", [6, 12, 20])
def test_reconstructions_lie_in_their_bins(digital, decode, index):
    mean, basis = np.asarray(STATISTICS.mean), np.asarray(STATISTICS.basis)
    bins = []
    for values in (LATENTS.astype(np.float32), decode(LATENTS, index)):
        scaled = (values[:50].reshape(50, 12) - mean) @ basis / np.asarray(digital.steps)[index]
        bins.append(np.sign(scaled) * np.floor(np.abs(scaled) + float(digital.rounding)))
    np.testing.assert_array_equal(bins[1], bins[0])
    assert np.mean(bins[0] == 0) < 1


def test_held_out_error_is_near_the_training_error(digital, decode):
    held_out = make_latents(1)
    errors = np.sum((decode(held_out, 15) - held_out) ** 2, axis=(1, 2, 3)) / float(STATISTICS.total_variance)
    assert abs(errors.mean() - digital.nmse[15]) <= STANDARD_ERRORS * errors.std() * np.sqrt(2 / COUNT)


def test_chosen_step_is_the_best_by_brute_force(digital):
    rng = np.random.default_rng(2)
    for mean_bits in (1.0, 10.0, 40.0):
        capacities = (mean_bits * rng.exponential(size=500)).astype(np.float32)
        brute = [
            np.mean(np.where(capacities >= bits, float(nmse), 1.0))
            for bits, nmse in zip(np.asarray(digital.bits), np.asarray(digital.nmse), strict=True)
        ]
        expected, choice = CHOOSE(digital, capacities)
        np.testing.assert_allclose(expected, brute, rtol=1e-5)
        assert choice == np.argmin(brute) > 0
    assert CHOOSE(digital, np.zeros(500, np.float32))[1] == 0


def test_gaussian_opta_bounds_it_without_fading(digital):
    """At a capacity equal to each step's bits, where the digital seed is at its best."""
    optimum = jax.jit(jax.vmap(gaussian_distortion, (None, 0)))(STATISTICS.variances, digital.bits[1:])
    ratio = np.asarray(digital.nmse)[1:] * float(STATISTICS.total_variance) / optimum
    # The fit to these very latents lowers the entropies and errors by less than the statistical error of a variance.
    assert np.all(ratio > 1 - STANDARD_ERRORS * np.sqrt(2 / COUNT))
    # Entropy-coded scalar quantisation loses 2 pi e / 12 = 1.42 at high rates, less at low ones, and the dead zone some
    # hundredths more.
    assert ratio[-1] > 1.3 and np.all(ratio < 1.03 * 2 * np.pi * np.e / 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: fit_digital(STATISTICS, LATENTS[..., :1]), r"latents' shape is .*h w c = 12"),
        (lambda _: fit_digital(STATISTICS, LATENTS * np.nan), "latents is 'not finite'"),
        (lambda _: fit_digital(STATISTICS, LATENTS, num_steps=1), "num_steps is 1; it must be 2 or more"),
        (lambda _: fit_digital(STATISTICS, LATENTS, rounding=0.6), "rounding is 0.6"),
        (lambda digital: quantise(digital, STATISTICS, jnp.zeros(5), 3), "latent's shape is"),
    ],
)
def test_bad_arguments(digital, call, message):
    with pytest.raises(ValueError, match=message):
        call(digital)


def test_products_are_exact(digital):
    assert inexact_products(quantise, digital, STATISTICS, LATENTS[0].astype(np.float32), 3, gradient=True) == []
