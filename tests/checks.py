"""Comparisons that many tests make."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats
from jax._src import compiler

from megjax.tpu import find_libtpu

STANDARD_ERRORS = 4.0
"""How far a mean may lie from what is expected of it: by chance it does so once in 16,000 times."""
SMALLEST_P_VALUE = 1e-4
NUM_DISTRIBUTION = 2**16
"""Samples of a Kolmogorov-Smirnov test: they show a distribution function that is off by 0.009 anywhere."""


def needs_libtpu(test):
    """Mark a test that compiles for TPUs, which takes long and libtpu."""
    missing = ""
    try:
        find_libtpu()
    except ValueError as error:
        missing = str(error)
    return pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=missing)(test))


def within_standard_error(samples, expected, axis=None, rounding=0.0):
    """Check the mean of independent real samples, over all or over one axis, against its expectation."""
    samples = np.asarray(samples, np.float64)
    count = samples.size if axis is None else samples.shape[axis]
    limit = STANDARD_ERRORS * samples.std(axis, ddof=1) / np.sqrt(count) + rounding
    mean = samples.mean(axis)
    assert np.all(np.abs(mean - expected) <= limit), (mean, expected, limit)


def check_distribution(samples, cdf):
    """Check NUM_DISTRIBUTION or more independent real samples against a distribution function or its name in scipy."""
    samples = np.asarray(samples, np.float64).reshape(-1)
    assert samples.size >= NUM_DISTRIBUTION
    assert scipy.stats.kstest(samples, cdf).pvalue > SMALLEST_P_VALUE


def assert_equal_trees(one, other):
    """Check that two pytrees hold the same numbers to the bit."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def metric_rows(folder: Path) -> list[dict]:
    """The rows of a training's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_losses(one: Path, other: Path, rel: float):
    """Check that two trainings logged the same steps and, to a relative tolerance, the same losses."""
    for a, b in zip(metric_rows(one), metric_rows(other), strict=True):
        assert a["step"] == b["step"] and np.isclose(a["loss"], b["loss"], rtol=rel, atol=0), (a, b)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the run-time checks of shapes and of reused keys, which users do not have."""
    shapes, keys = jaxtyping.config.jaxtyping_disable, jax.config.jax_debug_key_reuse
    jaxtyping.config.update("jaxtyping_disable", True)
    jax.config.update("jax_debug_key_reuse", False)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", shapes)
        jax.config.update("jax_debug_key_reuse", keys)


@contextlib.contextmanager
def fast_compile() -> Iterator[None]:
    """For programs that compile longer than they run: most of XLA's optimisations and its slowest emitters are off.

    XLA's CPU backend then compiles a training step in about half the time. No public setting reaches the emitters of
    every program, so this goes through a private function of JAX.
    """
    get_compile_options = compiler.get_compile_options

    def quick_options(*args, **kwargs):
        options = get_compile_options(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
        return options

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = quick_options
    try:
        yield
    finally:
        compiler.get_compile_options = get_compile_options
        jax.config.update("jax_disable_most_optimizations", before)


def arrays(seed, *shapes):
    """Normal float32 numbers in these shapes."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)


def both(plain, fused, *args):
    """Values and gradients of a nonlinear function of both, largest difference against the largest value."""

    @jax.jit
    def run(*args):
        return [value_and_gradients(function, *args) for function in (plain, fused)]

    for a, b in zip(*jax.device_get(run(*args)), strict=True):
        yield float(np.abs(a - b).max() / np.abs(a).max())


def value_and_gradients(function, *args):
    """The function's value, and the gradients of the sum of its sines by every argument."""

    def loss(*args):
        value = function(*args)
        return jnp.sum(jnp.sin(value)), value

    (_, value), slopes = jax.value_and_grad(loss, range(len(args)), has_aux=True)(*args)
    return value, *slopes


def directional(function, point, direction, step):
    """Central difference of `function` at `point` along `direction`, and a bound of its error.

    The difference with twice the step has four times the error of order step^2; rounding of the two values, each the
    mean of many float32 terms, adds its share.
    """

    def moved(size):
        return jax.tree.map(lambda x, d: x + np.float32(size) * d, point, direction)

    values = {size: float(function(moved(size))) for size in (-2 * step, -step, step, 2 * step)}
    near, far = ((values[size] - values[-size]) / (2 * size) for size in (step, 2 * step))
    rounding = 16 * np.finfo(np.float32).eps * abs(values[step]) / step
    return near, float(abs(far - near) + rounding)
