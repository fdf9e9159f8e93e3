"""Tests of the TR 38.901 large-scale model against hand-computed values and of the statistics of a drop of users."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel.large_scale import (
    Cell,
    building_loss_db,
    los_probability,
    noise_power_dbm,
    path_loss_db,
    shadowing_std_db,
)
from tests.checks import NUM_DISTRIBUTION, STANDARD_ERRORS, check_distribution, within_standard_error

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 2**17
ROUNDING_DB = 1e-4
"""A few float32 steps of values near 130 dB (1.5e-5 each)."""
HEIGHTS = {"uma": 25.0, "umi": 10.0}
PATH_LOSS = jax.jit(path_loss_db, static_argnums=0)
LOS_PROBABILITY = jax.jit(los_probability, static_argnums=0)
DROP = jax.jit(lambda cell, key, num: cell.drop(key, num), static_argnums=2)


@functools.cache
def drop(scenario):
    cell = {"uma": Cell("uma", radius_m=400.0), "umi": Cell("umi", radius_m=300.0)}[scenario]
    return jax.tree.map(np.asarray, DROP(cell, jax.random.key(0), NUM))


# Logarithms to base 10, distances in m, frequencies in GHz; log 3.5 = 0.544068, log 28 = 1.447158.
@pytest.mark.parametrize(
    ("scenario", "distance", "frequency", "h_ut", "los", "expected"),
    [
        # d3D = sqrt(100^2 + 23.5^2) = 102.7241, log 2.011673; 100 is below the breakpoint 4 24 0.5 3.5e9 / 3e8 = 560.
        # 28 + 22 * 2.011673 + 20 * 0.544068 = 28 + 44.2568 + 10.8814
        ("uma", 100.0, 3.5e9, 1.5, True, 83.1382),
        # d3D^2 = 1000552.25, log 6.000240; 560^2 + 23.5^2 = 314152.25, log 5.497140.
        # 28 + 20 * 6.000240 + 10.8814 - 9 * 5.497140 = 28 + 120.0048 + 10.8814 - 49.4743
        ("uma", 1000.0, 3.5e9, 1.5, True, 109.4119),
        # 13.54 + 39.08 * 2.011673 + 10.8814 - 0 = 13.54 + 78.6162 + 10.8814, more than in sight
        ("uma", 100.0, 3.5e9, 1.5, False, 103.0375),
        # d3D^2 = 100^2 + 8.5^2 = 10072.25, log 4.003126; below the breakpoint 4 9 0.5 3.5e9 / 3e8 = 210.
        # 32.4 + 21 / 2 * 4.003126 + 10.8814 = 32.4 + 42.0328 + 10.8814
        ("umi", 100.0, 3.5e9, 1.5, True, 85.3142),
        # d3D^2 = 250072.25, log 5.398066; 210^2 + 8.5^2 = 44172.25, log 4.645150.
        # 32.4 + 20 * 5.398066 + 10.8814 - 9.5 * 4.645150 = 32.4 + 107.9613 + 10.8814 - 44.1289
        ("umi", 500.0, 3.5e9, 1.5, True, 107.1138),
        # d3D^2 = 200^2 + 7^2 = 40049, log 4.602592. 35.3 / 2 * 4.602592 + 22.4 + 21.3 * 1.447158 - 0.3 * 1.5
        # = 81.2357 + 22.4 + 30.8245 - 0.45
        ("umi", 200.0, 28e9, 3.0, False, 134.0102),
    ],
)
def test_path_loss_by_hand(scenario, distance, frequency, h_ut, los, expected):
    loss = PATH_LOSS(scenario, distance, frequency, HEIGHTS[scenario], h_ut, los)
    assert loss.shape == () and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, atol=ROUNDING_DB)


@pytest.mark.parametrize(("scenario", "breakpoint_m", "ratio"), [("uma", 560.0, 40 / 22), ("umi", 210.0, 40 / 21)])
def test_slopes_meet_at_the_breakpoint_and_differ_around_it(scenario, breakpoint_m, ratio):
    def loss(distance):
        return path_loss_db(scenario, distance, 3.5e9, HEIGHTS[scenario], 1.5, True)

    step = 0.01
    (below, above), slope = jax.jit(jax.vmap(jax.value_and_grad(loss)))(breakpoint_m + step * np.float32([-1, 1]))
    # At most 40 dB a decade over the step of 2 * 0.01 m.
    assert abs(above - below) <= 40 * np.log10(1 + 2 * step / breakpoint_m) + ROUNDING_DB
    np.testing.assert_allclose(slope[1] / slope[0], ratio, rtol=1e-3)


def test_loss_out_of_sight_is_never_below_that_in_sight():
    distance = np.linspace(10.0, 5000.0, 2000, dtype=np.float32)
    for scenario, h_bs in HEIGHTS.items():
        for frequency in (0.5e9, 3.5e9, 100e9):
            lines = (np.full(2000, los) for los in (True, False))
            seen, blocked = (PATH_LOSS(scenario, distance, frequency, h_bs, 1.5, los) for los in lines)
            assert np.all(blocked >= seen) and np.all(np.diff(seen) > 0)


def test_environment_height_moves_the_breakpoint():
    # h_ut = 20, h_E = 12: 4 * 13 * 8 * 1e9 / 3e8 = 1386.7 m instead of 4 * 24 * 19 * 1e9 / 3e8 = 6080 m, so at 3 km
    # d3D^2 = 9000025, log 6.954244; 1386.667^2 + 25 = 1922869.4, log 6.283950:
    # 28 + 20 * 6.954244 + 0 - 9 * 6.283950 = 28 + 139.0849 - 56.5555; without, 28 + 11 * 6.954244
    np.testing.assert_allclose(PATH_LOSS("uma", 3e3, 1e9, 25.0, 20.0, True, 12.0), 110.5293, atol=ROUNDING_DB)
    np.testing.assert_allclose(PATH_LOSS("uma", 3e3, 1e9, 25.0, 20.0, True), 104.4967, atol=ROUNDING_DB)


def test_los_probability_by_hand():
    # 18/100 + exp(-100/63) (1 - 18/100) = 0.18 + 0.204477 * 0.82
    np.testing.assert_allclose(LOS_PROBABILITY("uma", 100.0), 0.347671, rtol=1e-5)
    # 0.18 + exp(-100/36) 0.82 = 0.18 + 0.0621765 * 0.82
    np.testing.assert_allclose(LOS_PROBABILITY("umi", 100.0), 0.230985, rtol=1e-5)
    # C' = 0.95^1.5 = 0.925945; 1 + 0.925945 * 5/4 * 1 * exp(-100/150) = 1 + 0.925945 * 1.25 * 0.513417 = 1.594245
    np.testing.assert_allclose(LOS_PROBABILITY("uma", 100.0, 22.5), 0.347671 * 1.594245, rtol=1e-5)
    distance = np.concatenate([[1.0, 10.0, 18.0], np.linspace(18.01, 5000.0, 5000)]).astype(np.float32)
    for scenario in HEIGHTS:
        probability = np.asarray(LOS_PROBABILITY(scenario, distance, 22.5))
        np.testing.assert_array_equal(probability[:3], 1)
        assert np.all((probability > 0) & (probability <= 1))


def test_noise_power_by_hand():
    # k T B = 1.380649e-23 * 290 * 20e6 W = 8.007764e-11 mW = -100.9649 dBm, plus 9 dB
    np.testing.assert_allclose(noise_power_dbm(20e6, 9.0), -91.9649, atol=ROUNDING_DB)
    np.testing.assert_allclose(noise_power_dbm(1.0), -173.9752, atol=ROUNDING_DB)
    np.testing.assert_allclose(noise_power_dbm(1.0, 0.0, 145.0), -173.9752 - 3.0103, atol=ROUNDING_DB)


def test_building_loss_by_hand():
    # 3.5 GHz: glass 2.7, infrared-reflecting 24.05, concrete 19 dB; indoors 0.5 * 8 = 4 dB.
    # 5 - 10 log(0.3 * 0.5370318 + 0.7 * 0.01258925 = 0.1699220) = 5 + 7.69750
    np.testing.assert_allclose(building_loss_db("low", 3.5e9, 8.0), 12.69750 + 4, atol=ROUNDING_DB)
    # 5 - 10 log(0.7 * 0.003935501 + 0.3 * 0.01258925 = 0.006531627) = 5 + 21.84979
    np.testing.assert_allclose(building_loss_db("high", 3.5e9, 0.0), 26.84979, atol=ROUNDING_DB)


def test_drop_shapes_and_link_budget():
    users = drop("uma")
    assert all(array.shape == (NUM,) for array in users)
    assert [array.dtype for array in users] == [np.float32, np.bool_, np.float32, np.float32, np.float32]
    # 46 dBm - (-91.9649 dBm) = 137.9649 dB
    np.testing.assert_allclose(users.snr_db, 137.9649 - users.path_loss_db - users.shadowing_db, atol=ROUNDING_DB)
    some = slice(2000)
    expected = PATH_LOSS("uma", np.clip(users.distance_m[some], 35, 400), 3.5e9, 25.0, 1.5, users.los[some])
    np.testing.assert_allclose(users.path_loss_db[some], expected, atol=ROUNDING_DB)


def test_users_are_uniform_over_the_area():
    check_distribution((drop("uma").distance_m.astype(np.float64) ** 2 - 35**2) / (400**2 - 35**2), "uniform")


@pytest.mark.parametrize("scenario", ["uma", pytest.param("umi", marks=pytest.mark.slow)])
def test_los_statistics_of_a_drop(scenario):
    users = drop(scenario)
    probability = np.asarray(LOS_PROBABILITY(scenario, users.distance_m), np.float64)
    near = users.distance_m < 120
    for some in (near, ~near):
        excess = users.los[some] - probability[some]
        assert abs(excess.sum()) <= STANDARD_ERRORS * np.sqrt(np.sum(probability[some] * (1 - probability[some])))


@pytest.mark.parametrize(("scenario", "blocked_std"), [("uma", 6.0), pytest.param("umi", 7.82, marks=pytest.mark.slow)])
def test_shadowing_is_normal_with_the_tabulated_deviation(scenario, blocked_std):
    np.testing.assert_array_equal(shadowing_std_db(scenario, jnp.array([True, False])), np.float32([4, blocked_std]))
    users = drop(scenario)
    std = np.where(users.los, 4.0, blocked_std)
    for some in (users.los, ~users.los):
        within_standard_error(users.shadowing_db[some], 0.0)
        within_standard_error((users.shadowing_db[some] / std[some]) ** 2, 1.0)
    check_distribution(users.shadowing_db / std, "norm")


@pytest.mark.slow
def test_high_uma_users_draw_their_environment_height():
    # h_ut = 22.5: h_E is 1 with probability 1 / (1 + C), else 12, 15, 18 or 21. At 0.5 GHz the breakpoints 4 (25 - h_E)
    # (22.5 - h_E) 0.5e9 / 3e8 are 3440, 910, 500, 210 and 40 m: a narrow annulus around 1 km tells them all apart.
    cell = Cell("uma", 1000.1, 0.5e9, h_ut_m=22.5, min_distance_m=1000.0)
    users = jax.tree.map(np.asarray, DROP(cell, jax.random.key(3), NUM_DISTRIBUTION))
    losses = [float(PATH_LOSS("uma", 1000.05, 0.5e9, 25.0, 22.5, True, h)) for h in (1.0, 12.0, 15.0, 18.0, 21.0)]
    # C = 0.925945 * 1.25 * 10^3 * exp(-1000 / 150) = 1157.43 * 1.272634e-3 = 1.47299
    rise = 0.925945 * 1.25 * 10**3 * np.exp(-1000 / 150)
    seen = users.path_loss_db[users.los]
    drawn = np.argmin(np.abs(seen[:, None] - np.array(losses)), axis=1)
    np.testing.assert_allclose(seen, np.array(losses)[drawn], atol=0.01)
    for index, expected in enumerate([1 / (1 + rise)] + 4 * [rise / (1 + rise) / 4]):
        error = np.sqrt(expected * (1 - expected) / seen.size)
        assert abs(np.mean(drawn == index) - expected) <= STANDARD_ERRORS * error < expected


@pytest.mark.slow
def test_drop_jit_vmap_and_loop_agree():
    def sample(key, radius, frequency, power):
        return Cell("umi", radius, frequency, power).drop(key, 6)

    swept = np.array([[100.0, 2e9, 23.0], [250.0, 28e9, 30.0]], np.float32)
    keys = jax.random.split(jax.random.key(4), 2)
    mapped = jax.jit(jax.vmap(sample))(keys, *swept.T)
    assert mapped.snr_db.shape == (2, 6)
    one = jax.jit(sample)
    for i, key in enumerate(jax.random.split(jax.random.key(4), 2)):
        for single, several in zip(one(key, *map(float, swept[i])), mapped, strict=True):
            np.testing.assert_allclose(single, several[i], rtol=1e-5, atol=ROUNDING_DB)


@pytest.mark.slow
def test_path_loss_jit_and_vmap_agree_with_arrays():
    distance, los = np.float32([20.0, 150.0, 900.0]), np.array([True, False, True])
    array = path_loss_db("umi", distance, 6e9, 10.0, 1.5, los)
    mapped = jax.jit(jax.vmap(lambda d, seen: path_loss_db("umi", d, 6e9, 10.0, 1.5, seen)))(distance, los)
    np.testing.assert_allclose(mapped, array, atol=ROUNDING_DB)


@pytest.mark.slow
def test_gradients():
    for scenario, h_bs in HEIGHTS.items():

        def loss(distance, frequency, los, scenario=scenario, h_bs=h_bs):
            return path_loss_db(scenario, distance, frequency, h_bs, 1.5, los)

        def sight(distance, scenario=scenario):
            return los_probability(scenario, distance, 1.5)

        slopes = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0)))(700.0, 2e9, np.array([True, False]))
        assert np.all(np.asarray(slopes) > 0)
        slope = jax.jit(jax.grad(sight))(100.0)
        assert np.isfinite(slope) and slope < 0
    key = jax.random.key(5)
    model = Cell("uma", h_ut_m=15.0)
    gradient = jax.jit(jax.grad(lambda cell: jnp.mean(cell.drop(key, 50).snr_db)))(model)
    assert all(np.isfinite(leaf) and leaf != 0 for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose([gradient.tx_power_dbm, gradient.noise_figure_db], [1, -1], rtol=1e-5)


GOOD = dict(scenario="uma", distance_2d_m=100.0, frequency_hz=2e9, h_bs_m=25.0, h_ut_m=1.5, los=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scenario="rural"), "scenario is 'rural'; it must be one of uma, umi"),
        (dict(distance_2d_m=0.0), "distance_2d_m is 0.0; it must be within 10-5000 m"),
        (dict(distance_2d_m=np.array([100.0, 6e3])), "distance_2d_m is"),
        (dict(distance_2d_m=np.nan), "distance_2d_m is nan"),
        (dict(frequency_hz=2.0), "frequency_hz is 2.0; it must be within"),
        (dict(frequency_hz=200e9), "frequency_hz is"),
        (dict(h_ut_m=1.0), "h_ut_m is 1.0; it must be within 1.5-22.5 m"),
        (dict(h_bs_m=10.0), "h_bs_m is 10.0; it must be more than 22.5 m"),
        (dict(scenario="umi", h_bs_m=0.5), "h_bs_m is 0.5; it must be more than 1 m"),
        (dict(environment_height_m=2.0), "environment_height_m is 2.0; it must be 0 m or more and below h_ut_m=1.5"),
    ],
)
def test_bad_path_loss_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        path_loss_db(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scenario="rma"), "scenario is 'rma'; it must be one of uma, umi"),
        (dict(radius_m=6e3), "radius_m is 6000.0; it must be within 10-5000 m"),
        (dict(radius_m=30.0), "min_distance_m is 35.0; it must be below radius_m=30.0"),
        (dict(min_distance_m=0.0), "min_distance_m is 0.0; it must be within"),
        (dict(frequency_hz=0.4e9), "frequency_hz is"),
        (dict(tx_power_dbm=np.inf), "tx_power_dbm is inf"),
        (dict(antenna_gain_db=np.nan), "antenna_gain_db is nan"),
        (dict(bandwidth_hz=-1.0), "bandwidth_hz is -1.0; it must be more than 0 Hz"),
        (dict(noise_figure_db=-1.0), "noise_figure_db is -1.0; it must be 0 dB or more"),
        (dict(h_ut_m=30.0), "h_ut_m is 30.0"),
        (dict(h_bs_m=20.0), "h_bs_m is 20.0"),
    ],
)
def test_bad_cells(change, message):
    with pytest.raises(ValueError, match=message):
        Cell(**change)


def test_other_bad_arguments():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="num_users is 0"):
        Cell().drop(key, 0)
    with pytest.raises(ValueError, match="has shape .*: vmap over the model"):
        Cell(radius_m=np.array([100.0, 200.0])).drop(key, 3)
    with pytest.raises(ValueError, match="distance_2d_m is -1.0; it must be more than 0 m"):
        los_probability("uma", -1.0)
    with pytest.raises(ValueError, match="scenario is 'x'"):
        shadowing_std_db("x", True)
    with pytest.raises(ValueError, match="temperature_k is 0"):
        noise_power_dbm(1e6, 0.0, 0)
    with pytest.raises(ValueError, match="building is 'tent'; it must be one of low, high"):
        building_loss_db("tent", 2e9, 1.0)
    with pytest.raises(ValueError, match="indoor_distance_m is 30.0"):
        building_loss_db("low", 2e9, 30.0)
