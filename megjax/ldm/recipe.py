"""Sizes and schedules of the bundled model's training, as frozen presets."""

import dataclasses

from megjax.configs import require
from megjax.diffusion.schedules import SchedulerConfig
from megjax.diffusion.vae import VAEConfig
from megjax.metrics.scenenet import SceneNetConfig
from megjax.training import FitConfig

MAX_TOKENS = 48
"""Longest prompt in tokens with its two end marks; the longest caption of three objects has 44."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One training stage: its batch size and its fit."""

    batch: int = 16
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self):
        require(self.batch >= 1, "batch", self.batch, "at least 1")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what `train.ldm` computes.

    `vae_widths` are channels from the image to the latent (three halvings, as in Stable Diffusion), `unet_widths` those
    from the latent down; the text encoder has `text_layers` layers of `text_width`.
    """

    image_size: int = 64
    vae_widths: tuple[int, ...] = (16, 32, 64, 128)
    unet_widths: tuple[int, ...] = (96, 192)
    unet_layers: int = 2
    unet_heads: int = 4
    text_width: int = 128
    text_layers: int = 3
    num_images: int = 65_536
    vae: StageConfig = StageConfig(
        batch=16, fit=FitConfig(num_steps=4_400, learning_rate=1.5e-3, warmup_steps=100, ema_decay=0.995)
    )
    scenenet: StageConfig = StageConfig(
        batch=64, fit=FitConfig(num_steps=1_500, learning_rate=2e-3, warmup_steps=100, weight_decay=1e-2, seed=1)
    )
    unet: StageConfig = StageConfig(
        batch=64, fit=FitConfig(num_steps=7_000, learning_rate=1e-3, warmup_steps=300, ema_decay=0.998, seed=2)
    )

    def __post_init__(self):
        require(self.image_size >= 16 and self.image_size % 16 == 0, "image_size", self.image_size, "a multiple of 16")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")

    @property
    def vae_config(self) -> VAEConfig:
        blocks = len(self.vae_widths)
        return VAEConfig(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=self.vae_widths,
            norm_num_groups=8,
            sample_size=self.image_size,
        )

    @property
    def scenenet_config(self) -> SceneNetConfig:
        return SceneNetConfig(image_size=self.image_size)

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """Stable Diffusion's betas with the velocity as target, so that very dark and very bright scenes come out."""
        return SchedulerConfig(
            sampler="ddim",
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        )
