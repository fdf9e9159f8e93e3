"""Schemes, each beside the link that it builds; `SCHEMES` lists them."""

from megjax.system.schemes.analog import AnalogLink, Centralized, Latent, LatentDenoiser, LatentWiener, Seed, SeedKLT
from megjax.system.schemes.base import (
    NUM_BLOCKS,
    SCHEMES,
    WEIGHT_GRID_DB,
    Parts,
    Scheme,
    codec_statistics,
    find_scheme,
    latent_moments,
    latent_symbols,
    split_name,
)
from megjax.system.schemes.coded import CentralizedCoded, CodedImageLink, ImageCodecTable, fit_image_codec
from megjax.system.schemes.digital import DigitalLink, SeedDigital
from megjax.system.schemes.opta import OPTA, OPTALink
from megjax.system.schemes.prompt import Prompt, PromptLink
from megjax.system.schemes.qam import CentralizedQAM, QAMLink
from megjax.system.schemes.split import Split, SplitConstants, SplitLink
from megjax.system.schemes.split_seed import SeedErrors, SeedSplit, SeedSplitLink, SplitSeed, fit_seed_errors

__all__ = [
    "AnalogLink",
    "Centralized",
    "CentralizedCoded",
    "CentralizedQAM",
    "CodedImageLink",
    "DigitalLink",
    "ImageCodecTable",
    "Latent",
    "LatentDenoiser",
    "LatentWiener",
    "NUM_BLOCKS",
    "OPTA",
    "OPTALink",
    "Parts",
    "Prompt",
    "PromptLink",
    "QAMLink",
    "SCHEMES",
    "Scheme",
    "Seed",
    "SeedDigital",
    "SeedErrors",
    "SeedKLT",
    "SeedSplit",
    "SeedSplitLink",
    "Split",
    "SplitConstants",
    "SplitLink",
    "SplitSeed",
    "WEIGHT_GRID_DB",
    "codec_statistics",
    "find_scheme",
    "fit_image_codec",
    "fit_seed_errors",
    "latent_moments",
    "latent_symbols",
    "split_name",
]
