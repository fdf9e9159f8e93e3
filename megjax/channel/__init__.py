"""Fading-channel simulator: laws of the gains, links over them, their closed forms, and rollouts of millions.

Everything takes one realisation, is differentiable where the mathematics is, and is vmapped by the caller, over keys
and over the parameters of a model alike. The link is y_t = sqrt(p_t) h_t s_t + n_t with n_t ~ CN(0, sigma^2), where
sigma^2 = 10^(-snr_db / 10) is absolute. `channel.theory` holds the closed forms, `channel.mimo` beams and capacities.
"""

from megjax.channel import mimo, theory
from megjax.channel.csi import (
    ChannelKnowledge,
    ImperfectCSI,
    delayed_gains,
    effective_noise_var,
    estimate_gains,
    estimation_error_var,
    outdated_gains,
)
from megjax.channel.fading import (
    FADINGS,
    Fading,
    FadingLaw,
    GaussMarkovFading,
    JakesFading,
    NakagamiFading,
    NoFading,
    RayleighFading,
    RicianFading,
    ShadowedFading,
    find_fading,
)
from megjax.channel.large_scale import Cell, Drop, los_probability, noise_power_dbm, path_loss_db, shadowing_std_db
from megjax.channel.loading import mean_lmmse_error_awgn, static_load
from megjax.channel.mimo import MIMOFading
from megjax.channel.modulation import MODULATIONS, bits_per_symbol, constellation, demodulate, modulate
from megjax.channel.ofdm import OFDM
from megjax.channel.packing import MAPPINGS, block_mask, pack, radiated_energy, symbols_per_block, unpack
from megjax.channel.random import complex_normal
from megjax.channel.reductions import Counts, Histogram, Moments, Reduction, Samples, Statistics
from megjax.channel.rollout import rollout
from megjax.channel.tdl import TDL, TappedDelayLine
from megjax.channel.transmission import (
    equalize_lmmse,
    equalize_zf,
    lmmse_error_var,
    post_equalisation_snr,
    transmit,
    zf_error_var,
)

__all__ = [
    "Cell",
    "ChannelKnowledge",
    "Counts",
    "Drop",
    "FADINGS",
    "Fading",
    "FadingLaw",
    "GaussMarkovFading",
    "Histogram",
    "ImperfectCSI",
    "JakesFading",
    "MAPPINGS",
    "MIMOFading",
    "MODULATIONS",
    "Moments",
    "NakagamiFading",
    "NoFading",
    "OFDM",
    "RayleighFading",
    "Reduction",
    "RicianFading",
    "Samples",
    "ShadowedFading",
    "Statistics",
    "TDL",
    "TappedDelayLine",
    "bits_per_symbol",
    "block_mask",
    "complex_normal",
    "constellation",
    "delayed_gains",
    "demodulate",
    "effective_noise_var",
    "equalize_lmmse",
    "equalize_zf",
    "estimate_gains",
    "estimation_error_var",
    "find_fading",
    "lmmse_error_var",
    "los_probability",
    "mean_lmmse_error_awgn",
    "mimo",
    "modulate",
    "noise_power_dbm",
    "outdated_gains",
    "pack",
    "path_loss_db",
    "post_equalisation_snr",
    "radiated_energy",
    "rollout",
    "shadowing_std_db",
    "static_load",
    "symbols_per_block",
    "theory",
    "transmit",
    "unpack",
    "zf_error_var",
]
