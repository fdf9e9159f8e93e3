"""Tests of the decibel conversions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import units


def test_hand_computed_values():
    np.testing.assert_allclose(units.db_to_linear(jnp.array([0.0, 10.0, -20.0])), [1.0, 10.0, 0.01], rtol=1e-5)
    np.testing.assert_allclose(units.linear_to_db(2.0), 3.0102999566, rtol=1e-6)
    np.testing.assert_allclose(units.noise_var_from_snr_db(5.0), 10**-0.5, rtol=1e-6)
    assert units.linear_to_db(0.0) == -jnp.inf
    assert units.db_to_linear(3).dtype == jnp.float32 and units.db_to_linear(3).shape == ()


def test_round_trip_and_transforms():
    snrs_db = jnp.linspace(-30.0, 40.0, 15)
    loop = jnp.stack([units.linear_to_db(units.db_to_linear(x)) for x in snrs_db])
    mapped = jax.jit(jax.vmap(lambda x: units.linear_to_db(units.db_to_linear(x))))(snrs_db)
    np.testing.assert_allclose(loop, snrs_db, atol=1e-4)
    np.testing.assert_allclose(mapped, loop, atol=1e-5)
    # d/dx 10^(-x/10) = -ln(10)/10 at x = 0
    np.testing.assert_allclose(jax.grad(units.noise_var_from_snr_db)(0.0), -np.log(10) / 10, rtol=1e-5)


def test_check_snr_db_accepts_numbers():
    np.testing.assert_array_equal(units.check_snr_db([-5, np.int64(0), jnp.float32(2.5)]), [-5.0, 0.0, 2.5])


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), "loud", "10", ["0", 1.0], True, 1j, None, [0.0, float("nan")], [[1.0], [1.0, 2.0]]],
)
def test_check_snr_db_rejects_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="snr_db is .*finite number in dB") as caught:
        units.check_snr_db(bad)
    assert "\n" not in str(caught.value)
