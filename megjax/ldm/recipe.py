"""Sizes and schedules of the bundled model's training, as frozen presets."""

import dataclasses

from megjax.configs import require
from megjax.diffusion.clip import CLIPTextConfig
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.unet import UNetConfig
from megjax.diffusion.vae import VAEConfig
from megjax.metrics.scenenet import SceneNetConfig
from megjax.training import FitConfig

MAX_TOKENS = 48
"""Longest prompt in tokens with its two end marks; the longest caption has 45."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One training stage: its batch size, the number of shares it is drawn in, and its fit."""

    batch: int = 16
    num_shards: int = 1
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    def __post_init__(self):
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        divides = self.num_shards >= 1 and self.batch % self.num_shards == 0
        require(divides, "num_shards", self.num_shards, f"a divisor of the batch, {self.batch}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what `train.ldm` computes.

    `vae_widths` are channels from the image to the latent (three halvings, as in Stable Diffusion), `unet_widths` those
    from the latent down, with attention at the lower resolution; the text encoder has `text_layers` layers of
    `text_width`. The U-Net is trained on the latents of `num_images` pictures.
    """

    image_size: int = 64
    vae_widths: tuple[int, ...] = (16, 32, 64, 128)
    unet_widths: tuple[int, int] = (96, 160)
    text_width: int = 128
    text_layers: int = 2
    num_images: int = 32_000
    vae: StageConfig = StageConfig(
        batch=16, fit=FitConfig(num_steps=4_400, learning_rate=1.5e-3, warmup_steps=100, ema_decay=0.995)
    )
    scenenet: StageConfig = StageConfig(
        batch=64, fit=FitConfig(num_steps=1_500, learning_rate=2e-3, warmup_steps=100, weight_decay=1e-2, seed=1)
    )
    unet: StageConfig = StageConfig(
        batch=32,
        num_shards=2,
        fit=FitConfig(num_steps=4_800, learning_rate=1e-3, warmup_steps=300, ema_decay=0.998, seed=2),
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
    def unet_config(self) -> UNetConfig:
        return UNetConfig(
            sample_size=self.image_size // self.vae_config.downsample,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=self.unet_widths,
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=self.text_width,
            attention_head_dim=4,
        )

    def text_config(self, vocab_size: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
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
            skip_prk_steps=True,
            clip_sample=False,
        )


PRESETS = {
    "scenes": Recipe(),
    "scenes128": Recipe(
        image_size=128,
        vae_widths=(32, 64, 128, 128),
        unet_widths=(160, 320),
        text_width=192,
        text_layers=4,
        num_images=200_000,
        vae=StageConfig(32, 1, FitConfig(num_steps=40_000, learning_rate=5e-4, warmup_steps=500, clip_norm=0.3)),
        scenenet=StageConfig(64, 1, FitConfig(num_steps=4_000, learning_rate=1e-3, weight_decay=1e-2, seed=1)),
        unet=StageConfig(128, 2, FitConfig(num_steps=60_000, learning_rate=5e-4, warmup_steps=1000, seed=2)),
    ),
    "tiny": Recipe(
        image_size=16,
        vae_widths=(8, 8, 8, 8),
        unet_widths=(16, 16),
        text_width=16,
        text_layers=1,
        num_images=200,
        vae=StageConfig(4, 1, FitConfig(num_steps=6, warmup_steps=1, log_every=2)),
        scenenet=StageConfig(4, 1, FitConfig(num_steps=6, warmup_steps=1, log_every=2, seed=1)),
        unet=StageConfig(4, 2, FitConfig(num_steps=6, warmup_steps=1, log_every=2, seed=2)),
    ),
}
"""`scenes` is what ships; `scenes128` needs a GPU; `tiny` runs every line of code in a minute and learns nothing."""
