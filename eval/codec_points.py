"""Points at which the codec and its rivals are measured, and the rows of the table that show them."""

import itertools
from typing import NamedTuple

from megjax.codec import link
from megjax.codec.importance import POWERS
from megjax.units import linear_to_db

MODES = ("equal_energy", "equal_power")
RAW = ("raw", "raw_wiener", "raw_denoiser")
FADINGS = {"rayleigh": "Rayleigh", "awgn": "AWGN"}
"""Names and titles."""


class Point(NamedTuple):
    """One scheme at one effective SNR, which several rows of the table may show."""

    scheme: str
    fading: str
    snr_db: float
    num_symbols: int
    power: str = "equal"
    mapping: str = "ordered"

    @property
    def is_variant(self) -> bool:
        """Whether it is the seed with another mapping or power than its own."""
        return self.scheme == "seed" and (self.power, self.mapping) != ("codec", "ordered")

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        return f"{self.scheme}-{self.fading}-{self.power}-{self.mapping}-{self.num_symbols}-{self.snr_db:.4f}dB"


class Row(NamedTuple):
    """One row of the table: where the point stands in the comparison."""

    mode: str
    rate: float
    snr_db: float
    budget: float
    """P: 1 at equal power, n / (2 K) at equal energy."""
    point: Point


def table_rows(snrs_db, rates, num_values: int, with_denoiser: bool) -> list[Row]:
    """Every row of the table; rows that are the same physics name the same point."""
    rows = []
    for mode, fading, snr_db, rate in itertools.product(MODES, FADINGS, snrs_db, rates):
        symbols = link.symbols_at_rate(float(rate), num_values)
        budget = num_values / (2 * symbols) if mode == "equal_energy" else 1.0
        place = fading, round(float(snr_db + linear_to_db(budget)), 4), symbols
        points = [Point("seed", *place, "codec"), Point("klt", *place, "codec")]
        points += [Point("digital", *place), Point("opta", *place)]
        if mode == "equal_energy":
            points += [Point("seed", *place, "equal")]
            points += [Point("seed", *place, power, "interleaved") for power in POWERS]
        rows += [Row(mode, float(rate), snr_db, budget, point) for point in points]
    for mode, fading, snr_db in itertools.product(MODES, FADINGS, snrs_db):
        for scheme in RAW if with_denoiser else RAW[:2]:
            # In natural order neighbours share a block: dealt out, a deep fade leaves some of every region.
            point = Point(scheme, fading, round(float(snr_db), 4), num_values // 2, "equal", "interleaved")
            rows.append(Row(mode, 1.0, snr_db, 1.0, point))
    return rows


def shows_images(row: Row, rates: tuple[float, ...]) -> bool:
    """Whether images are decoded: at equal energy of every scheme over Rayleigh fading, of seed and raw over AWGN.

    At equal power it is of seed and raw over Rayleigh fading.
    """
    scheme, equal_energy = row.point.scheme, row.mode == "equal_energy"
    if scheme == "opta" or row.point.is_variant or row.rate not in rates:
        return False
    return equal_energy + (row.point.fading == "rayleigh") + (scheme not in ("klt", "digital")) >= 2
