"""Mobile edge generation end to end: schemes, the protocol as one pure function, its constants and its costs."""

from megjax.system.build import (
    MODES,
    NUM_BLOCKS,
    SCHEMES,
    codec_statistics,
    latent_moments,
    make_simulator,
    measured_weights,
    num_symbols,
    simulate,
)
from megjax.system.costs import Resources, SchemeCost, Work, measure_work, scheme_cost
from megjax.system.image_codec import CodedImageLink, ImageCodecTable, fit_image_codec
from megjax.system.links import AnalogLink, Code, Link, Noisy, QAMLink, Source
from megjax.system.rewards import image_quality
from megjax.system.simulator import BlockWeights, Delivery, Simulator, Transmission
from megjax.system.source import STATISTICS_NAME, SourceStatistics
from megjax.system.split import (
    PromptLink,
    SeedErrors,
    SeedSplit,
    SeedSplitLink,
    SplitConstants,
    SplitLink,
    fit_seed_errors,
)

__all__ = [
    "AnalogLink",
    "BlockWeights",
    "Code",
    "CodedImageLink",
    "Delivery",
    "MODES",
    "ImageCodecTable",
    "Link",
    "NUM_BLOCKS",
    "Noisy",
    "PromptLink",
    "QAMLink",
    "SCHEMES",
    "Resources",
    "STATISTICS_NAME",
    "SchemeCost",
    "SeedErrors",
    "SeedSplit",
    "SeedSplitLink",
    "Simulator",
    "Source",
    "SourceStatistics",
    "SplitConstants",
    "SplitLink",
    "Transmission",
    "Work",
    "codec_statistics",
    "fit_image_codec",
    "fit_seed_errors",
    "image_quality",
    "latent_moments",
    "make_simulator",
    "measure_work",
    "measured_weights",
    "num_symbols",
    "scheme_cost",
    "simulate",
]
