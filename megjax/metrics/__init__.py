"""Quality of received images: PSNR, SSIM, Frechet distances, caption accuracy by SceneNet, bootstrap intervals."""

from megjax.metrics.bootstrap import bootstrap_interval
from megjax.metrics.frechet import FrechetInterval, feature_statistics, frechet_distance, frechet_interval
from megjax.metrics.image import psnr, ssim
from megjax.metrics.inception import Inception
from megjax.metrics.kid import kernel_distance, squared_mmd
from megjax.metrics.scenenet import SceneNet, SceneNetConfig

__all__ = [
    "FrechetInterval",
    "Inception",
    "SceneNet",
    "SceneNetConfig",
    "bootstrap_interval",
    "feature_statistics",
    "frechet_distance",
    "frechet_interval",
    "kernel_distance",
    "psnr",
    "squared_mmd",
    "ssim",
]
