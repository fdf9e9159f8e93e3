"""Quality of received images: PSNR, SSIM, Frechet and kernel distances, caption accuracy, intervals, streaming."""

from megjax.metrics.base import METRICS, Metric, Received, mean_over_images
from megjax.metrics.bootstrap import bootstrap_interval
from megjax.metrics.frechet import FrechetInterval, feature_statistics, frechet_distance, frechet_interval
from megjax.metrics.image import psnr, ssim
from megjax.metrics.inception import Inception
from megjax.metrics.kid import kernel_distance, squared_mmd
from megjax.metrics.scenenet import SceneNet, SceneNetConfig
from megjax.metrics.streaming import GaussianMoments, make_image_metrics

__all__ = [
    "FrechetInterval",
    "GaussianMoments",
    "Inception",
    "METRICS",
    "Metric",
    "Received",
    "SceneNet",
    "SceneNetConfig",
    "bootstrap_interval",
    "feature_statistics",
    "frechet_distance",
    "frechet_interval",
    "kernel_distance",
    "make_image_metrics",
    "mean_over_images",
    "psnr",
    "squared_mmd",
    "ssim",
]
