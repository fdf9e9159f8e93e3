"""Laws of block fading, each beside the record that names it; `FADINGS` lists them."""

from megjax.channel.fading.base import DEPENDENCES, FADINGS, Fading, FadingLaw, find_fading
from megjax.channel.fading.correlated import GaussMarkovFading, JakesFading
from megjax.channel.fading.independent import NakagamiFading, NoFading, RayleighFading, RicianFading
from megjax.channel.fading.shadowed import ShadowedFading

__all__ = [
    "DEPENDENCES",
    "FADINGS",
    "Fading",
    "FadingLaw",
    "GaussMarkovFading",
    "JakesFading",
    "NakagamiFading",
    "NoFading",
    "RayleighFading",
    "RicianFading",
    "ShadowedFading",
    "find_fading",
]
