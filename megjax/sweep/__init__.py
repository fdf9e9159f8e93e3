"""Sweeps over schemes, SNRs, rates, fading, policies and seeds that can be killed at any moment and lose nothing."""

from megjax.sweep.config import Point, SweepConfig
from megjax.sweep.engine import read_points, run_sweep

__all__ = ["Point", "SweepConfig", "read_points", "run_sweep"]
