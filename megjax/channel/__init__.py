"""Block-fading radio channel: fading laws, transmission, LMMSE equalisation, and packing of reals into symbols.

One realisation per call; the caller vmaps. The model is y_t = sqrt(p_t) h_t s_t + n_t with n_t ~ CN(0, sigma^2), where
sigma^2 = 10^(-snr_db / 10) is absolute.
"""

from megjax.channel.fading import Fading, NoFading, RayleighFading
from megjax.channel.packing import MAPPINGS, block_mask, pack, radiated_energy, symbols_per_block, unpack
from megjax.channel.transmission import equalize_lmmse, post_equalisation_snr, transmit

__all__ = [
    "MAPPINGS",
    "Fading",
    "NoFading",
    "RayleighFading",
    "block_mask",
    "equalize_lmmse",
    "pack",
    "post_equalisation_snr",
    "radiated_energy",
    "symbols_per_block",
    "transmit",
    "unpack",
]
