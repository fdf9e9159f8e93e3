"""Large-scale propagation of 3GPP TR 38.901: path loss, line of sight, shadowing, noise, and drops of users in a cell.

Scenarios are "uma" (urban macro) and "umi" (urban micro, street canyon). Equations, unless said otherwise: 3GPP TR
38.901, "Study on channel model for frequencies from 0.5 to 100 GHz", version 16.1.0, section 7.4. Functions work
elementwise: each argument is a number or an array, and all arrays have the same shape.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Key

from megjax.channel.parameters import channel_model, check, scalar
from megjax.configs import require_count
from megjax.keys import threefry
from megjax.pytrees import static
from megjax.units import db_to_linear, linear_to_db

SPEED_OF_LIGHT = 3.0e8
"""m/s, as rounded in note 1 of table 7.4.1-1."""
BOLTZMANN = 1.380649e-23
"""J/K."""
_BOLTZMANN_DB = 10 * math.log(1e3 * BOLTZMANN) / math.log(10)
"""In dB of mW per Hz and K."""
MIN_DISTANCE_M, MAX_DISTANCE_M = 10.0, 5000.0
MIN_HEIGHT_M, MAX_HEIGHT_M = 1.5, 22.5
BUILDINGS = ("low", "high")
BUILDING_LOSS_STD_DB = {"low": 4.4, "high": 6.5}
"""Standard deviation of the penetration loss, table 7.4.3-2."""


class Scenario(NamedTuple):
    """Constants of one row of tables 7.4.1-1 and 7.4.2-1. Losses are in dB, distances in m, frequencies in GHz."""

    los_constant_db: float
    los_exponent: float
    beyond_breakpoint: float
    """Factor of 10 log10(breakpoint^2 + height difference^2); it makes the two slopes meet."""
    nlos_constant_db: float
    nlos_exponent: float
    nlos_frequency_exponent: float
    nlos_height_slope: float
    los_decay_m: float
    los_std_db: float
    nlos_std_db: float
    lowest_h_bs_m: float
    """Base stations are higher than this: in UMa above every user, in UMi above the environment of 1 m."""
    h_bs_m: float
    min_distance_m: float


SCENARIOS = {
    "uma": Scenario(28.0, 2.2, 0.9, 13.54, 3.908, 2.0, 0.6, 63.0, 4.0, 6.0, MAX_HEIGHT_M, 25.0, 35.0),
    "umi": Scenario(32.4, 2.1, 0.95, 22.4, 3.53, 2.13, 0.3, 36.0, 4.0, 7.82, 1.0, 10.0, 10.0),
}


def path_loss_db(
    scenario: str,
    distance_2d_m: ArrayLike,
    frequency_hz: ArrayLike,
    h_bs_m: ArrayLike,
    h_ut_m: ArrayLike,
    los: ArrayLike,
    environment_height_m: ArrayLike = 1.0,
) -> Float[Array, "*s"]:
    """Median path loss in dB between isotropic antennas, table 7.4.1-1, in line of sight where `los`, else not.

    The loss out of sight is the larger of its own formula and the loss in sight. Both slopes in sight meet at the
    breakpoint 4 (h_bs - h_E)(h_ut - h_E) f / c, where h_E = `environment_height_m` is 1 m in UMi and for UMa users
    below 13 m; for higher UMa users the report makes it random, which `Cell.drop` follows. The report has h_bs_m at
    25 m (UMa) and 10 m (UMi). Raises ValueError for an unknown scenario, a horizontal distance outside 10-5000 m, a
    carrier outside 0.5-100 GHz, h_ut_m outside 1.5-22.5 m, a UMa h_bs_m of 22.5 m or less (UMi: 1 m), or an
    environment_height_m that is negative or not below h_ut_m and h_bs_m.
    """
    constants = _check_scenario(scenario)
    _check_distance("distance_2d_m", distance_2d_m)
    _check_frequency(frequency_hz)
    _check_heights(constants, h_bs_m, h_ut_m)
    for name, height in (("h_ut_m", h_ut_m), ("h_bs_m", h_bs_m)):
        _check_between("environment_height_m", environment_height_m, 0.0, height, f"0 m or more and below {name}")
    values = (distance_2d_m, frequency_hz, h_bs_m, h_ut_m, environment_height_m)
    return _path_loss_db(constants, *(jnp.asarray(value, jnp.float32) for value in values), jnp.asarray(los, bool))


def los_probability(scenario: str, distance_2d_m: ArrayLike, h_ut_m: ArrayLike = MIN_HEIGHT_M) -> Float[Array, "*s"]:
    """Probability of line of sight of an outdoor user, table 7.4.2-1; `h_ut_m` matters in UMa from 13 m up.

    Just beyond 18 m the report's product for high UMa users exceeds 1 by under 1 %; it is cut at 1. Raises ValueError
    for an unknown scenario, a distance of 0 m or less, or h_ut_m outside 1.5-22.5 m.
    """
    constants = _check_scenario(scenario)
    check("distance_2d_m", distance_2d_m, "more than 0 m", lambda d: d > 0)
    _check_user_height(h_ut_m)
    distance, height = jnp.asarray(distance_2d_m, jnp.float32), jnp.asarray(h_ut_m, jnp.float32)
    near = jnp.minimum(18 / distance, 1.0)
    probability = near + jnp.exp(-distance / constants.los_decay_m) * (1 - near)
    if scenario == "uma":
        probability = probability * (1 + _height_factor(distance, height))
    return jnp.minimum(probability, 1.0)


def shadowing_std_db(scenario: str, los: ArrayLike) -> Float[Array, "*s"]:
    """Standard deviation of the log-normal shadowing in dB, table 7.4.1-1; ValueError for an unknown scenario."""
    constants = _check_scenario(scenario)
    return jnp.where(jnp.asarray(los, bool), jnp.float32(constants.los_std_db), jnp.float32(constants.nlos_std_db))


def building_loss_db(building: str, frequency_hz: ArrayLike, indoor_distance_m: ArrayLike) -> Float[Array, "*s"]:
    """Median loss in dB of entering a building and `indoor_distance_m` of it, tables 7.4.3-1 and 7.4.3-2.

    To be added to the outdoor path loss of an indoor user, whose shadowing then is 7 dB, plus a normal variable of
    `BUILDING_LOSS_STD_DB`. "low" is ordinary glass and concrete, "high" infrared-reflecting glass and concrete. Raises
    ValueError for another `building`, a carrier outside 0.5-100 GHz, or an indoor distance outside 0-25 m.
    """
    if building not in BUILDINGS:
        raise ValueError(f"building is {building!r}; it must be one of {', '.join(BUILDINGS)}")
    _check_frequency(frequency_hz)
    check("indoor_distance_m", indoor_distance_m, "within 0-25 m", lambda d: (d >= 0) & (d <= 25))
    frequency_ghz = jnp.asarray(frequency_hz, jnp.float32) / 1e9
    concrete = db_to_linear(-(5 + 4 * frequency_ghz))
    if building == "low":
        passed = 0.3 * db_to_linear(-(2 + 0.2 * frequency_ghz)) + 0.7 * concrete
    else:
        passed = 0.7 * db_to_linear(-(23 + 0.3 * frequency_ghz)) + 0.3 * concrete
    return 5 - linear_to_db(passed) + 0.5 * jnp.asarray(indoor_distance_m, jnp.float32)


def noise_power_dbm(
    bandwidth_hz: ArrayLike, noise_figure_db: ArrayLike = 0.0, temperature_k: ArrayLike = 290.0
) -> Float[Array, "*s"]:
    """Thermal noise k T B of a receiver in dBm, plus its noise figure: -173.98 dBm in 1 Hz at 290 K.

    Raises ValueError for a bandwidth or temperature of 0 or less, or a negative noise figure.
    """
    _check_receiver(bandwidth_hz, noise_figure_db)
    check("temperature_k", temperature_k, "more than 0 K", lambda t: t > 0)
    # Milliwatts in dB are summed rather than multiplied: k T is below the range where float32 keeps its precision.
    thermal = linear_to_db(bandwidth_hz) + linear_to_db(temperature_k) + _BOLTZMANN_DB
    return thermal + jnp.asarray(noise_figure_db, jnp.float32)


class Drop(NamedTuple):
    """Users of one cell; every array is [u]. `snr_db` is the average SNR of a user at transmit power p = 1."""

    distance_m: Float[Array, " u"]
    """Horizontal."""
    los: Bool[Array, " u"]
    path_loss_db: Float[Array, " u"]
    shadowing_db: Float[Array, " u"]
    """Positive is additional loss."""
    snr_db: Float[Array, " u"]


@channel_model
class Cell:
    """One cell with a base station in its centre and outdoor users around it, uniform over the area.

    Average SNRs follow from the link budget tx_power_dbm + antenna_gain_db - path loss - shadowing - noise power at
    290 K. Defaults of None are the scenario's own: base station 25 m high in UMa and 10 m in UMi, no user within 35 m
    or 10 m of it. All users have the height `h_ut_m`, in UMa above 13 m each with a random environment height as in
    note 1 of table 7.4.1-1; sight and shadowing are independent between users. Raises ValueError for an unknown
    scenario, a non-finite power or gain, whatever `path_loss_db` and `noise_power_dbm` refuse, and unless 10 m <=
    min_distance_m < radius_m <= 5000 m.
    """

    scenario: str = static("uma")
    radius_m: ArrayLike = 500.0
    frequency_hz: ArrayLike = 3.5e9
    tx_power_dbm: ArrayLike = 46.0
    bandwidth_hz: ArrayLike = 20e6
    noise_figure_db: ArrayLike = 9.0
    antenna_gain_db: ArrayLike = 0.0
    h_ut_m: ArrayLike = MIN_HEIGHT_M
    h_bs_m: ArrayLike | None = None
    min_distance_m: ArrayLike | None = None

    def __post_init__(self):
        constants = _check_scenario(self.scenario)
        nearest = self._leaf_or_default("min_distance_m")
        _check_distance("radius_m", self.radius_m)
        _check_distance("min_distance_m", nearest)
        _check_between("min_distance_m", nearest, MIN_DISTANCE_M, self.radius_m, "below radius_m")
        _check_frequency(self.frequency_hz)
        _check_heights(constants, self._leaf_or_default("h_bs_m"), self.h_ut_m)
        _check_receiver(self.bandwidth_hz, self.noise_figure_db)
        for name in ("tx_power_dbm", "antenna_gain_db"):
            check(name, getattr(self, name), "a finite number in dB", lambda value: True)

    def drop(self, key: Key[Array, ""], num_users: int) -> Drop:
        """`num_users` independent users; ValueError when there are none, or when a leaf is an array (vmap over it)."""
        require_count("num_users", num_users)
        constants = SCENARIOS[self.scenario]
        distance_key, los_key, environment_key, shadowing_key = jax.random.split(threefry(key), 4)
        height, h_bs = self._leaf("h_ut_m"), self._leaf("h_bs_m")
        nearest, radius = self._leaf("min_distance_m"), self._leaf("radius_m")
        area = jax.random.uniform(distance_key, (num_users,), jnp.float32)
        distance = jnp.sqrt(jnp.square(nearest) + area * (jnp.square(radius) - jnp.square(nearest)))
        los = jax.random.uniform(los_key, (num_users,), jnp.float32) < los_probability(self.scenario, distance, height)
        environment = jnp.ones(num_users, jnp.float32)
        if self.scenario == "uma":
            environment = _environment_height_m(environment_key, distance, height)
        loss = _path_loss_db(constants, distance, self._leaf("frequency_hz"), h_bs, height, environment, los)
        shadowing = shadowing_std_db(self.scenario, los) * jax.random.normal(shadowing_key, (num_users,), jnp.float32)
        noise = noise_power_dbm(self._leaf("bandwidth_hz"), self._leaf("noise_figure_db"))
        snr = self._leaf("tx_power_dbm") + self._leaf("antenna_gain_db") - loss - shadowing - noise
        return Drop(distance, los, loss, shadowing, snr)

    def _leaf_or_default(self, name: str) -> Any:
        value = getattr(self, name)
        return getattr(SCENARIOS[self.scenario], name) if value is None else value

    def _leaf(self, name: str) -> Float[Array, ""]:
        return scalar(name, self._leaf_or_default(name))


def _path_loss_db(
    constants: Scenario, distance: Array, frequency: Array, h_bs: Array, h_ut: Array, environment: Array, los: Array
) -> Float[Array, "*s"]:
    """`path_loss_db` without its checks, whose bounds a drawn distance may miss by a rounding error."""
    breakpoint_m = 4 * (h_bs - environment) * (h_ut - environment) * (frequency / SPEED_OF_LIGHT)
    height_squared = jnp.square(h_bs - h_ut)
    log_distance = linear_to_db(jnp.square(distance) + height_squared) / 2
    log_frequency = linear_to_db(frequency / 1e9)
    near = constants.los_exponent * log_distance
    far = 4 * log_distance - constants.beyond_breakpoint * linear_to_db(jnp.square(breakpoint_m) + height_squared)
    in_sight = constants.los_constant_db + 2 * log_frequency + jnp.where(distance <= breakpoint_m, near, far)
    blocked = constants.nlos_constant_db + constants.nlos_exponent * log_distance
    blocked = blocked + constants.nlos_frequency_exponent * log_frequency - constants.nlos_height_slope * (h_ut - 1.5)
    return jnp.where(los, in_sight, jnp.maximum(in_sight, blocked))


def _height_factor(distance: Array, h_ut: Array) -> Float[Array, "*s"]:
    """C'(h_ut) (5/4) (d / 100)^3 exp(-d / 150), 0 up to 18 m and for users up to 13 m: tables 7.4.1-1 and 7.4.2-1."""
    high = jnp.power(jnp.maximum(h_ut - 13, 0.0) / 10, 1.5)
    far = 1.25 * jnp.power(distance / 100, 3) * jnp.exp(-distance / 150)
    return high * jnp.where(distance > 18, far, 0.0)


def _environment_height_m(key: Key[Array, ""], distance: Float[Array, " u"], h_ut: Array) -> Float[Array, " u"]:
    """Effective environment height in UMa, note 1 of table 7.4.1-1.

    It is 1 m with probability 1 / (1 + C), otherwise uniform on {12, 15, ..., h_ut - 1.5} m; below 13.5 m, where the
    report leaves that set empty, it is 12 m.
    """
    low_key, height_key = jax.random.split(key)
    low = jax.random.uniform(low_key, distance.shape, jnp.float32) * (1 + _height_factor(distance, h_ut)) < 1
    num_heights = jnp.maximum(jnp.floor((h_ut - 13.5) / 3) + 1, 1.0)
    index = jnp.floor(jax.random.uniform(height_key, distance.shape, jnp.float32) * num_heights)
    return jnp.where(low, 1.0, 12 + 3 * index)


def _check_scenario(scenario: str) -> Scenario:
    if not isinstance(scenario, str) or scenario not in SCENARIOS:
        raise ValueError(f"scenario is {scenario!r}; it must be one of {', '.join(SCENARIOS)}")
    return SCENARIOS[scenario]


def _check_distance(name: str, distance: Any) -> None:
    allowed = f"within {MIN_DISTANCE_M:g}-{MAX_DISTANCE_M:g} m"
    check(name, distance, allowed, lambda d: (d >= MIN_DISTANCE_M) & (d <= MAX_DISTANCE_M))


def _check_frequency(frequency_hz: Any) -> None:
    check("frequency_hz", frequency_hz, "within 0.5e9-100e9 Hz", lambda f: (f >= 0.5e9) & (f <= 100e9))


def _check_user_height(h_ut_m: Any) -> None:
    allowed = f"within {MIN_HEIGHT_M:g}-{MAX_HEIGHT_M:g} m"
    check("h_ut_m", h_ut_m, allowed, lambda h: (h >= MIN_HEIGHT_M) & (h <= MAX_HEIGHT_M))


def _check_heights(constants: Scenario, h_bs_m: Any, h_ut_m: Any) -> None:
    lowest = constants.lowest_h_bs_m
    check("h_bs_m", h_bs_m, f"more than {lowest:g} m", lambda h: h > lowest)
    _check_user_height(h_ut_m)


def _check_receiver(bandwidth_hz: Any, noise_figure_db: Any) -> None:
    check("bandwidth_hz", bandwidth_hz, "more than 0 Hz", lambda b: b > 0)
    check("noise_figure_db", noise_figure_db, "0 dB or more", lambda f: f >= 0)


def _check_between(name: str, value: Any, low: float, high: Any, allowed: str) -> None:
    """ValueError unless low <= value < high; nothing is known of a traced upper bound."""
    if isinstance(high, jax.core.Tracer):
        check(name, value, allowed, lambda v: v >= low)
    else:
        check(name, value, f"{allowed}={high}", lambda v: (v >= low) & (v < np.asarray(high, np.float64)))
