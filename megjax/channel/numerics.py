"""Arithmetic of `megjax.numerics` under its former name."""

from megjax.numerics import safe_sqrt as safe_sqrt
from megjax.numerics import squared_magnitude as squared_magnitude
