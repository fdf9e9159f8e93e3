"""The smallest pipeline, codec and latents that all schemes run on, sixteen fading blocks included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from megjax.channel import RayleighFading
from megjax.codec import SeedCodec, SeedCodecConfig
from megjax.codec.fitting import initial_network
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layout import ASSETS
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.tokenization import load_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm.recipe import PRESETS
from megjax.system import Source, SourceStatistics, fit_image_codec, make_simulator

LATENT, IMAGE, BLOCKS = (4, 4, 4), (16, 16, 3), 16
STATISTICS = SourceStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, -0.2, 0.0, 0.1), (1.2, 0.8, 1.0, 0.9))
PROMPTS = ["a red house", "two boats by night"]


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unchecked():
    """Without the run-time check of annotations, which users do not have and which would hide the project's errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_network(make, seed):
    """Graph and parameters of `make()` without its initialisers: deviations are the inverse root of the fan-in."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        values = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return leaf.replace(jnp.asarray(values, jnp.float32))

    return graph, nnx.from_flat_state([(path, fill(leaf)) for path, leaf in nnx.to_flat_state(abstract)])


@pytest.fixture(scope="session")
def pipe():
    """Random networks, 16x16 pixels, latents [4 4 4]."""
    recipe = dataclasses.replace(PRESETS["tiny"], image_size=16, vae_widths=(8, 8, 8))
    tokenizer = load_tokenizer(ASSETS / "scenes" / "tokenizer")
    unet = UNetConfig(
        sample_size=LATENT[0],
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    configs = Configs(recipe.text_config(len(tokenizer)), unet, recipe.vae_config, recipe.scheduler_config)
    parts = {
        "text_encoder": random_network(lambda: CLIPTextModel(configs.text_encoder, rngs=nnx.Rngs(0)), 0),
        "unet": random_network(lambda: UNet2DConditionModel(configs.unet, rngs=nnx.Rngs(0)), 1),
        "vae": random_network(lambda: AutoencoderKL(configs.vae, rngs=nnx.Rngs(0)), 2),
    }
    graphs = Graphs(**{name: graph for name, (graph, _) in parts.items()}, scaling_factor=1.0)
    return StableDiffusion(configs, graphs, {name: params for name, (_, params) in parts.items()}, tokenizer)


@pytest.fixture(scope="session")
def latents():
    """Gaussian latents [n 4 4 4], neighbours correlated by 0.7, with the moments of `STATISTICS` by channel."""
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(0.7 ** np.abs(np.arange(4)[:, None] - np.arange(4)[None]))
    noise = np.einsum("ih,jw,nhwc->nijc", root, root, rng.standard_normal((1000, *LATENT)))
    return (np.array(STATISTICS.latent_mean) + np.array(STATISTICS.latent_std) * noise).astype(np.float32)


@pytest.fixture(scope="session")
def images():
    """Smooth images [n 16 16 3], most of them dark, so that bits are not equally likely."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(size=(40, 4, 4, 3)) ** 2
    fine = np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)
    return np.clip(fine + 0.02 * rng.standard_normal((40, *IMAGE)), 0, 1).astype(np.float32)


@pytest.fixture(scope="session")
def codec(latents):
    """The linear code of the latents, as a codec, with some of them for validation."""
    config = SeedCodecConfig(LATENT, tile=(4, 4), width=8, hidden=8, decoder_blocks=1, snr_steps=3, rate_steps=3)
    return SeedCodec(initial_network(config, latents), latents[:50])


@pytest.fixture(scope="session")
def source(latents, images):
    """Six images and latents, which have nothing to do with each other."""
    return Source(*(jnp.asarray(x[:6]) for x in (latents, images, latents)))


@pytest.fixture(scope="session")
def table(images):
    """Coded images at three SNRs."""
    return fit_image_codec(jax.random.key(9), images[:8], RayleighFading(), [0.0, 10.0, 20.0], num_blocks=BLOCKS)


@pytest.fixture(scope="session")
def make(pipe, codec, table):
    """`make(scheme, variant, **options)`: a simulator of this pipeline and codec with two denoising steps."""

    def made(scheme="seed", variant=None, *, codec=codec, rate=2.0, **options):
        options = {"num_steps": 2, "statistics": STATISTICS, "guided": False} | options
        if variant == "coded":
            options = {"image_codec": table} | options
        return make_simulator(pipe, codec, scheme, variant=variant, rate=rate, **options)

    return made


@pytest.fixture(scope="session")
def deliver():
    """`deliver(simulator, source, snr_db, realisations)`: received latents or pixels, no latent decoded, compiled."""

    @functools.partial(jax.jit, static_argnames=("simulator", "realisations"))
    def run(simulator, key, params, source, snr_db, realisations):
        numbers, ids = (jnp.arange(len(source.latents)), jnp.arange(realisations)), jnp.zeros((6, 48), jnp.int32)
        found = simulator.deliver(key, params, source, ids, snr_db, *numbers, generate=False)
        # Left out, the denoising of split latents is not even compiled.
        return found._replace(latents=None) if simulator.link.result == "noisy" else found

    def delivered(simulator, source, snr_db, realisations=1, seed=0):
        return run(simulator, jax.random.key(seed), simulator.params, source, jnp.float32(snr_db), realisations)

    return delivered
