"""Tests of the closed forms' gradients against finite differences, and of vmap and arrays against each other."""

import jax
import numpy as np
import pytest

from megjax.channel import theory

pytestmark = pytest.mark.usefixtures("fast_compile")
FUNCTIONS = {
    "ber_awgn": (lambda snr: theory.ber_awgn(snr, "16qam"), 10.0),
    "ber_rayleigh": (lambda snr: theory.ber_rayleigh(snr, "64qam", 2), 10.0),
    "ber_nakagami": (lambda snr, m: theory.ber_nakagami(snr, "qpsk", m), 10.0, 2.0),
    "ber_rician": (lambda snr, k: theory.ber_rician(snr, "qpsk", k), 10.0, 2.0),
    "capacity_awgn": (theory.capacity_awgn, 3.0),
    "ergodic_capacity_rayleigh": (theory.ergodic_capacity_rayleigh, 3.0),
    "ergodic_capacity_nakagami": (theory.ergodic_capacity_nakagami, 3.0, 2.0),
    "ergodic_capacity_rician": (theory.ergodic_capacity_rician, 3.0, 2.0),
    "mean_lmmse_error_rayleigh": (theory.mean_lmmse_error_rayleigh, 3.0),
    "mean_lmmse_error_nakagami": (theory.mean_lmmse_error_nakagami, 3.0, 2.0),
    "mean_lmmse_error_rician": (theory.mean_lmmse_error_rician, 3.0, 2.0),
    "outage_rayleigh": (theory.outage_rayleigh, 3.0, 1.0),
    "outage_nakagami": (theory.outage_nakagami, 3.0, 1.0, 2.0),
    "outage_rician": (theory.outage_rician, 3.0, 1.0, 2.0),
    "outage_capacity_rayleigh": (theory.outage_capacity_rayleigh, 3.0, 0.1),
    "jakes_autocorrelation": (theory.jakes_autocorrelation, 0.1, 3.0),
    "level_crossing_rate_rician": (theory.level_crossing_rate_rician, 0.6, 20.0, 2.0),
    "average_fade_duration_rayleigh": (theory.average_fade_duration_rayleigh, 0.6, 20.0),
    "average_fade_duration_rician": (theory.average_fade_duration_rician, 0.6, 20.0, 2.0),
    "marcum_q1": (theory.marcum_q1, 1.0, 2.0),
}


DEAR = {name for name in FUNCTIONS if name.endswith(("_nakagami", "_rician"))} - {"mean_lmmse_error_nakagami"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in DEAR else ()) for name in FUNCTIONS]
)
def test_gradients_and_vmap(name):
    """Gradients in every argument match central differences, and vmap agrees with arrays."""
    function, *arguments = FUNCTIONS[name]
    arguments = np.array(arguments, np.float32)
    steps = 0.02 * np.diag(arguments)

    @jax.jit
    def compute(points):
        mapped, gradients = jax.vmap(jax.value_and_grad(lambda values: function(*values)))(points)
        return mapped, gradients, function(*points.T)

    points = np.concatenate([arguments[None], arguments + steps, arguments - steps])
    mapped, gradients, arrays = map(np.asarray, compute(points))
    value, gradient = mapped[0], gradients[0]
    difference = np.subtract(*mapped[1:].reshape(2, -1)) / (2 * np.diag(steps))
    # A step of 2 % leaves a third-order term of some 1e-3 and, in flat directions, float32 rounding.
    np.testing.assert_array_less(
        np.abs(gradient - difference), 1e-2 * np.abs(difference) + 1e-5 * abs(value) / arguments
    )
    assert np.all(np.isfinite(gradients)) and np.all(gradients != 0)
    np.testing.assert_allclose(arrays, mapped, rtol=1e-5)


@pytest.mark.slow
def test_parameters_may_be_arrays_while_the_snr_is_not():
    functions = (
        lambda snr, k, m: theory.ber_rician(snr, "qpsk", k),
        lambda snr, k, m: theory.ber_nakagami(snr, "qpsk", m),
        lambda snr, k, m: theory.ergodic_capacity_rician(snr, k),
        lambda snr, k, m: theory.mean_lmmse_error_nakagami(snr, m),
        lambda snr, k, m: theory.outage_rician(snr, 1.0, k),
        lambda snr, k, m: theory.nakagami_gain_cdf(snr / 30, m),
    )

    @jax.jit
    def compute(*arguments):
        return [(function(*arguments), jax.vmap(function, (None, 0, 0))(*arguments)) for function in functions]

    found = compute(10.0, np.float32([0.0, 1.0, 5.0]), np.float32([0.5, 1.0, 4.0]))
    for together, one_by_one in found:
        np.testing.assert_allclose(together, one_by_one, rtol=1e-5)
