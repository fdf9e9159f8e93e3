"""Tests of the random numbers of the channel: the same words as JAX's Threefry, exact transforms, right law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from megjax.channel.random import (
    _random_words,
    _unit_exponential,
    complex_normal,
    fold_in_each,
    split,
    uniform,
    unit_circle,
    unit_phasor,
)
from megjax.keys import threefry
from tests.checks import NUM_DISTRIBUTION, check_distribution, within_standard_error

NUM = 2**18
UNIFORM_ANGLE = stats.uniform(-np.pi, 2 * np.pi).cdf


@pytest.fixture(scope="module")
def words():
    """Both ends of the range, the neighbourhood of sqrt(1/2), quadrant borders, and random words."""
    near = np.arange(-2000, 2000, dtype=np.int64)
    special = np.concatenate([near + offset for offset in (0, 0xB504F333, *(i * 2**29 for i in range(8)))])
    drawn = np.random.default_rng(0).integers(0, 2**32, 100_000)
    return (np.concatenate([special, drawn]) % 2**32).astype(np.uint32)


@pytest.fixture(scope="module")
def numbers():
    return np.asarray(jax.jit(lambda key: complex_normal(key, (NUM,)))(jax.random.key(1)))


def test_words_are_those_of_split():
    first, second = jax.jit(_random_words, static_argnums=1)(jax.random.key(3), (50, 20))
    split = jax.random.key_data(jax.random.split(jax.random.key(3), 1000)).reshape(50, 20, 2)
    np.testing.assert_array_equal(first, split[..., 0])
    np.testing.assert_array_equal(second, split[..., 1])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_fold_in_each(impl):
    data = jnp.array([[0, 1, 2], [7, 2**31, 2**32 - 1]], jnp.uint32)
    key = jax.random.key(4, impl=impl)
    folded = jax.jit(fold_in_each)(key, data)
    assert folded.shape == data.shape
    for i in range(2):
        for j in range(3):
            expected = jax.random.fold_in(threefry(key), data[i, j])
            np.testing.assert_array_equal(jax.random.key_data(folded[i, j]), jax.random.key_data(expected))


def test_split_is_that_of_jax():
    ours = jax.random.key_data(jax.jit(split, static_argnums=1)(jax.random.key(8), 3))
    np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.split(jax.random.key(8), 3)))


def test_uniform():
    draw = jax.jit(uniform, static_argnums=1)
    numbers = np.asarray(draw(jax.random.key(9), (NUM_DISTRIBUTION,)))
    assert numbers.min() >= 0 and numbers.max() < 1
    check_distribution(numbers, "uniform")
    assert draw(jax.random.key(9), ()).shape == ()


def test_exponential_is_exact_at_both_ends(words):
    measured = np.asarray(jax.jit(_unit_exponential)(words), np.float64)
    below = (2**32 - 1 - words.astype(np.float64) + 0.5) / 2**32  # 1 - u
    exact = np.where(below < 0.5, -np.log1p(-below), -np.log((words.astype(np.float64) + 0.5) / 2**32))
    # float32 rounds to 6e-8; a handful of operations follow one another.
    np.testing.assert_allclose(measured, exact, rtol=4 * np.finfo(np.float32).eps)
    assert measured.max() == pytest.approx(33 * np.log(2)) and measured.min() == pytest.approx(2.0**-33)


def test_circle(words):
    cosine, sine = (np.asarray(part, np.float64) for part in jax.jit(unit_circle)(words))
    angle = words.astype(np.float64) * (2 * np.pi / 2**32)
    np.testing.assert_allclose(cosine, np.cos(angle), atol=2 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(sine, np.sin(angle), atol=2 * np.finfo(np.float32).eps)


def test_laws(numbers):
    assert numbers.dtype == np.complex64
    numbers = numbers[:NUM_DISTRIBUTION].astype(np.complex128)
    check_distribution(np.abs(numbers) ** 2, "expon")
    check_distribution(np.angle(numbers), UNIFORM_ANGLE)
    for part in (numbers.real, numbers.imag):
        check_distribution(part, stats.norm(scale=np.sqrt(0.5)).cdf)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (lambda z: np.abs(z) ** 2, 1.0),
        (lambda z: np.abs(z) ** 4, 2.0),
        (lambda z: np.abs(z) ** 6, 6.0),
        (lambda z: (z**2).real, 0.0),
        (lambda z: (z[1:] * z[:-1].conj()).real, 0.0),
        (lambda z: (np.abs(z[1:]) ** 2 - 1) * (np.abs(z[:-1]) ** 2 - 1), 0.0),
        (lambda z: np.abs(z) ** 2 < 1e-4, -np.expm1(-1e-4)),
        (lambda z: np.abs(z) ** 2 > 9, np.exp(-9)),
    ],
)
def test_moments(numbers, moment, expected):
    within_standard_error(moment(numbers.astype(np.complex128)), expected)


def test_phasors():
    phasors = np.asarray(jax.jit(unit_phasor, static_argnums=1)(jax.random.key(5), (NUM_DISTRIBUTION,)))
    np.testing.assert_allclose(np.abs(phasors), 1, atol=2e-7)
    check_distribution(np.angle(phasors), UNIFORM_ANGLE)


def test_keys_of_another_generator():
    samples = jax.jit(complex_normal, static_argnums=1)(jax.random.key(6, impl="rbg"), (NUM_DISTRIBUTION,))
    check_distribution(np.abs(np.asarray(samples)) ** 2, "expon")


def test_jit_and_vmap_agree_with_the_loop():
    batched = jax.jit(jax.vmap(lambda key: complex_normal(key, (3, 5))))(jax.random.split(jax.random.key(7), 4))
    one = jax.jit(lambda key: complex_normal(key, (3, 5)))
    loop = [one(key) for key in jax.random.split(jax.random.key(7), 4)]
    np.testing.assert_allclose(batched, np.stack(loop), rtol=1e-6, atol=1e-7)


def test_too_many_numbers():
    with pytest.raises(ValueError, match="fewer than 2\\^32"):
        complex_normal(jax.random.key(0), (2**16, 2**16))
