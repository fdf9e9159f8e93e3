"""Gradients of every power policy in all that it is given, against central differences, and those of the energy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import NakagamiFading, RayleighFading, RicianFading, theory
from megjax.channel.loading import mean_lmmse_error_awgn, static_load
from megjax.power import POLICIES, LoadedPower, Problem, make_policy
from megjax.units import db_to_linear
from tests.checks import directional

pytestmark = pytest.mark.usefixtures("fast_compile")
T, FEW, STEP = 16, 5, 0.005
LAWS = {"rayleigh": RayleighFading(), "nakagami": NakagamiFading(2.5), "rician": RicianFading(4.0)}
BY_LAW = ("static", "inversion", "waterfilling")
POINTS = {"free": np.inf, "peak": 2.1}
PLAIN = ("loaded", *(name for name in POLICIES.names if name not in ("codec", "dp")))
CASES = [(name, "rayleigh", peak) for name in PLAIN for peak in POINTS]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        *((name, law, "free") for name in BY_LAW for law in ("nakagami", "rician")),
        ("dp", "rayleigh", "peak"),
    )
]


PRICE_KINKS = 0.01
"""Of a gradient through `dp`, whose prices are interpolated linearly."""


def make(name, law, blocks):
    return LoadedPower(jnp.linspace(1.6, 0.4, T)) if name == "loaded" else make_policy(name, LAWS[law], blocks)


def outputs(policy, point):
    """Weighted error, and energy, of the powers at a point."""
    problem = Problem(db_to_linear(point["snr_db"]), point["weights"], point["energy"], point["max_power"])
    power = policy.allocate(point["gains"], problem)
    errors = problem.weights / (1 + power * point["gains"] * problem.snr)
    return jnp.stack([jnp.sum(errors), jnp.sum(power)])


@pytest.mark.parametrize(("name", "law", "peak"), CASES)
def test_gradients_of_policies_are_those_of_central_differences(name, law, peak):
    blocks = FEW if name == "dp" else T
    rng = np.random.default_rng(2)

    def draw(*shape):
        return jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)

    point = {
        "snr_db": jnp.float32(2.0),
        "gains": jnp.exp(draw(blocks)),
        "weights": jnp.exp(draw(blocks)),
        "energy": jnp.float32(blocks),
        "max_power": jnp.float32(POINTS[peak]),
    }
    policy = make(name, law, blocks)
    directions = {
        "snr_db": 5 * draw(),
        "gains": draw(blocks) * point["gains"],
        "weights": draw(blocks) * point["weights"],
    }
    directions |= {"energy": jnp.float32(blocks)}
    values = jax.jit(functools.partial(outputs, policy))
    slopes = jax.jit(jax.jacrev(functools.partial(outputs, policy)))(point)
    forward = jax.jit(lambda point, along: jax.jvp(functools.partial(outputs, policy), (point,), (along,))[1])
    for quantity, along in directions.items():
        along = jax.tree.map(jnp.zeros_like, point) | {quantity: along}
        error, energy = np.tensordot(slopes[quantity], along[quantity], np.ndim(along[quantity])).tolist()
        found, uncertainty = directional(lambda point: values(point)[0], point, along, STEP)
        assert abs(error) > 5 * uncertainty or name == "equal", (quantity, error, uncertainty)
        kinks = PRICE_KINKS * abs(found) if name == "dp" else 0.0
        assert error == pytest.approx(found, abs=2 * uncertainty + kinks), quantity
        np.testing.assert_allclose(forward(point, along), [error, energy], rtol=1e-4, atol=1e-5)
        # All of the energy is spent, whatever the rest; under a peak also, as this one leaves room for it.
        assert energy == pytest.approx(float(along["energy"]), abs=1e-4), quantity


@pytest.mark.parametrize("mean_error", [mean_lmmse_error_awgn, theory.mean_lmmse_error_rayleigh])
def test_gradients_of_loads_are_those_of_central_differences(mean_error):
    rng = np.random.default_rng(3)
    weights, snr = jnp.asarray(np.geomspace(4, 0.01, T), jnp.float32), jnp.float32(0.7)
    of = jnp.asarray(rng.uniform(-1, 1, T), jnp.float32)
    total = jax.jit(lambda point: jnp.sum(of * static_load(*point, mean_error)))
    slopes = jax.jit(jax.grad(total))((weights, snr))
    load = static_load(weights, snr, mean_error)
    assert 1 < int(jnp.sum(load == 0)) < T - 1
    directions = [(weights * jax.nn.one_hot(i, T), jnp.float32(0)) for i in range(T)] + [(0 * weights, snr)]
    for along in directions:
        found, uncertainty = directional(total, (weights, snr), along, STEP)
        expected = float(jnp.sum(slopes[0] * along[0]) + slopes[1] * along[1])
        assert expected == pytest.approx(found, abs=2 * uncertainty)


def test_the_largest_of_equal_weights_have_gradients_of_their_own():
    """Without fading l = (1 + c) sqrt(w) / mean sqrt(w) - c with c = 1 / snr; at equal weights and c = 1, I - 1 / m."""
    jacobian = jax.jit(jax.jacrev(lambda weights: static_load(weights, 1.0)))(jnp.ones(4))
    np.testing.assert_allclose(jacobian, np.eye(4) - 0.25, atol=1e-5)
