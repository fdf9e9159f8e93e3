"""Recipes of codec training: sizes, conditions and step counts, and the run that follows them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from megjax.codec.fitting import Conditions, DecodeImages, calibrate, codec_loss, initial_network
from megjax.codec.network import Constant, SeedCodecConfig, SeedNetwork
from megjax.codec.seed import SeedCodec
from megjax.configs import require
from megjax.training import FitConfig, fit


@dataclasses.dataclass(frozen=True)
class CodecRecipe:
    """Everything that decides what a trained codec becomes, but the latents.

    `num_generated` latents come from the model's own prompts; `num_encoded` are images of the data set encoded by its
    VAE, where there is a data set; `num_validation` more generated ones stay with the codec. A step averages
    `num_shards` draws of the conditions, over the devices there are.
    """

    codec: SeedCodecConfig = SeedCodecConfig()
    conditions: Conditions = Conditions(first_share=0.5)
    fit: FitConfig = FitConfig()
    num_generated: int = 10_000
    num_encoded: int = 48_000
    num_validation: int = 200
    num_shards: int = 1

    def __post_init__(self):
        require(self.num_generated >= 2, "num_generated", self.num_generated, "at least 2")
        require(self.num_validation >= 1, "num_validation", self.num_validation, "at least 1")
        require(self.num_encoded >= 0, "num_encoded", self.num_encoded, "at least 0")
        require(self.num_shards >= 1, "num_shards", self.num_shards, "at least 1")


TRAINING = FitConfig(
    num_steps=14_000, learning_rate=1e-3, warmup_steps=200, ema_decay=0.999, log_every=100, steps_per_dispatch=100
)
PRESETS = {
    "scenes": CodecRecipe(SeedCodecConfig(width=448, hidden=448), fit=TRAINING),
    "tiny": CodecRecipe(
        SeedCodecConfig(width=32, hidden=32, decoder_blocks=1, snr_steps=3, rate_steps=3),
        Conditions(groups=2, group_size=16, first_share=0.5),
        FitConfig(num_steps=20, warmup_steps=5, log_every=5, steps_per_dispatch=5),
        num_generated=40,
        num_encoded=40,
        num_validation=20,
    ),
}


def denoiser(recipe: CodecRecipe) -> CodecRecipe:
    """The recipe of a learned receiver for the raw latent: the same decoder, no encoder, the latent's own symbols."""
    codec = dataclasses.replace(recipe.codec, transform="raw", encoder_blocks=0)
    return dataclasses.replace(
        recipe, codec=codec, conditions=dataclasses.replace(recipe.conditions, rates=(1.0,), equal_energy=False)
    )


def specialist(recipe: CodecRecipe, snr_db: float, num_symbols: int) -> CodecRecipe:
    """The recipe of a codec for one effective SNR and one number of symbols."""
    conditions = dataclasses.replace(recipe.conditions, snr_db=snr_db, num_symbols=num_symbols)
    return dataclasses.replace(recipe, conditions=conditions)


def train_codec(
    recipe: CodecRecipe,
    latents: Float[np.ndarray, "n h w c"],
    encoded: Float[np.ndarray, "m h w c"] | None,
    folder: Path,
    *,
    validation: Float[np.ndarray, "m h w c"] | None = None,
    start: SeedCodec | None = None,
    decode_images: DecodeImages | None = None,
    description: dict | None = None,
) -> SeedCodec:
    """Train on `latents`, of which the statistics are taken, and `encoded`; resumes from `folder`.

    `start` is a trained codec of the same configuration to go on from, instead of the KLT.
    """
    if start is None:
        network = initial_network(recipe.codec, latents, recipe.fit.seed)
    else:
        require(start.config == recipe.codec, "start's configuration", start.config, "that of the recipe")
        network: SeedNetwork = nnx.merge(start.graph, start.state)
    graph, params, constants = nnx.split(network, nnx.Param, Constant)
    sets = tuple(jnp.asarray(x.reshape(len(x), -1)) for x in (latents, encoded) if x is not None)
    total = float(latents.reshape(len(latents), -1).astype(np.float64).var(0).sum())
    described = dataclasses.asdict(recipe) | {"start": start is not None} | (description or {})
    del described["codec"]["dtype"], described["num_validation"]  # neither changes the run
    if recipe.num_shards == 1:  # as in runs from before there were shards
        del described["num_shards"]
    state = fit(
        codec_loss(graph, recipe.conditions, decode_images),
        params,
        {"constants": constants, "total_variance": jnp.float32(total), "latents": sets},
        recipe.fit,
        folder,
        num_shards=recipe.num_shards,
        description=described,
    )
    # Rounded as they are stored, so that the statistics of the code are those of the stored weights.
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.float16).astype(jnp.float32), state.ema)
    return SeedCodec(calibrate(nnx.merge(graph, stored, constants), latents), validation)
