"""Analog coders of latents behind one protocol: the learned codec and its linear rivals."""

from megjax.codec.coders.base import Coder
from megjax.codec.coders.klt import KLTCoder
from megjax.codec.coders.learned import LearnedCoder
from megjax.codec.coders.raw import RawCoder

__all__ = ["Coder", "KLTCoder", "LearnedCoder", "RawCoder"]
