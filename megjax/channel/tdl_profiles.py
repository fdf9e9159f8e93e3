"""Power-delay profiles TDL-A to TDL-E of 3GPP TR 38.901, tables 7.7.2-1 to 7.7.2-5."""

import dataclasses
import functools
from types import MappingProxyType

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class TDLProfile:
    """Taps of one table as (delay normalised by the RMS delay spread, Rayleigh power in dB) pairs.

    `line_of_sight_db` is the power of the constant-modulus path that arrives with the first tap, None where there is
    none. Powers are as printed; the properties normalise their sum to 1.
    """

    taps: tuple[tuple[float, float], ...]
    line_of_sight_db: float | None = None

    @functools.cached_property
    def delays(self) -> Float[np.ndarray, " l"]:
        """Normalised delays [l], float64."""
        return np.array([delay for delay, _ in self.taps])

    @functools.cached_property
    def rayleigh_powers(self) -> Float[np.ndarray, " l"]:
        """Linear powers [l] of the Rayleigh parts, float64."""
        return self._linear[1:] / self._linear.sum()

    @functools.cached_property
    def line_of_sight_power(self) -> float:
        """Linear power of the line of sight, 0 where there is none."""
        return float(self._linear[0] / self._linear.sum())

    @functools.cached_property
    def powers(self) -> Float[np.ndarray, " l"]:
        """Linear powers [l] of the taps, line of sight included, sum 1, float64."""
        return self.rayleigh_powers + self.line_of_sight_power * (np.arange(len(self.taps)) == 0)

    @functools.cached_property
    def rms_delay_spread(self) -> float:
        """Square root of the power-weighted variance of the normalised delays; 1 but for rounding in the tables."""
        mean = self.powers @ self.delays
        return float(np.sqrt(self.powers @ np.square(self.delays - mean)))

    @property
    def _linear(self) -> Float[np.ndarray, " n"]:
        line_of_sight_db = -np.inf if self.line_of_sight_db is None else self.line_of_sight_db
        return np.power(10.0, np.array([line_of_sight_db, *(power_db for _, power_db in self.taps)]) / 10)


# fmt: off
PROFILES = MappingProxyType({
    "A": TDLProfile((
        (0.0000, -13.4), (0.3819, 0.0), (0.4025, -2.2), (0.5868, -4.0), (0.4610, -6.0), (0.5375, -8.2),
        (0.6708, -9.9), (0.5750, -10.5), (0.7618, -7.5), (1.5375, -15.9), (1.8978, -6.6), (2.2242, -16.7),
        (2.1718, -12.4), (2.4942, -15.2), (2.5119, -10.8), (3.0582, -11.3), (4.0810, -12.7), (4.4579, -16.2),
        (4.5695, -18.3), (4.7966, -18.9), (5.0066, -16.6), (5.3043, -19.9), (9.6586, -29.7),
    )),
    "B": TDLProfile((
        (0.0000, 0.0), (0.1072, -2.2), (0.2155, -4.0), (0.2095, -3.2), (0.2870, -9.8), (0.2986, -1.2),
        (0.3752, -3.4), (0.5055, -5.2), (0.3681, -7.6), (0.3697, -3.0), (0.5700, -8.9), (0.5283, -9.0),
        (1.1021, -4.8), (1.2756, -5.7), (1.5474, -7.5), (1.7842, -1.9), (2.0169, -7.6), (2.8294, -12.2),
        (3.0219, -9.8), (3.6187, -11.4), (4.1067, -14.9), (4.2790, -9.2), (4.7834, -11.3),
    )),
    "C": TDLProfile((
        (0.0000, -4.4), (0.2099, -1.2), (0.2219, -3.5), (0.2329, -5.2), (0.2176, -2.5), (0.6366, 0.0),
        (0.6448, -2.2), (0.6560, -3.9), (0.6584, -7.4), (0.7935, -7.1), (0.8213, -10.7), (0.9336, -11.1),
        (1.2285, -5.1), (1.3083, -6.8), (2.1704, -8.7), (2.7105, -13.2), (4.2589, -13.9), (4.6003, -13.9),
        (5.4902, -15.8), (5.6077, -17.1), (6.3065, -16.0), (6.6374, -15.7), (7.0427, -21.6), (8.6523, -22.8),
    )),
    "D": TDLProfile((
        (0.0000, -13.5), (0.0350, -18.8), (0.6120, -21.0), (1.3630, -22.8), (1.4050, -17.9), (1.8040, -20.1),
        (2.5960, -21.9), (1.7750, -22.9), (4.0420, -27.8), (7.9370, -23.6), (9.4240, -24.8), (9.7080, -30.0),
        (12.5250, -27.7),
    ), line_of_sight_db=-0.2),
    "E": TDLProfile((
        (0.0000, -22.03), (0.5133, -15.8), (0.5440, -18.1), (0.5630, -19.8), (0.5440, -22.9), (0.7112, -22.4),
        (1.9092, -18.6), (1.9293, -20.8), (1.9589, -22.6), (2.6426, -22.3), (3.7136, -25.6), (5.4524, -20.2),
        (12.0034, -29.8), (20.6519, -29.2),
    ), line_of_sight_db=-0.03),
})
# fmt: on
"""In the order of the tables, which is not quite that of the delays."""
