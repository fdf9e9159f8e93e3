"""The smallest pipeline, codec and latents that all schemes run on, sixteen fading blocks included."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.codec import SeedCodec, SeedCodecConfig, SeedNetwork
from megjax.codec.fitting import initial_network
from megjax.codec.linear import latent_statistics
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layout import ASSETS
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.tokenization import load_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL
from megjax.ldm.recipe import PRESETS
from megjax.system import (
    ImageCodecTable,
    SeedErrors,
    Source,
    SourceStatistics,
    SystemConfig,
    find_scheme,
    make_simulator,
)
from tests import checks

LATENT, IMAGE = (4, 4, 4), (16, 16, 3)
STATISTICS = SourceStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, -0.2, 0.0, 0.1), (1.2, 0.8, 1.0, 0.9))
PROMPTS = ["a red house", "two boats by night"]
OPTIONS = ("rate", "mapping", "folder", "modulation", "device_steps", "server_steps")
CONFIG = [field.name for field in dataclasses.fields(SystemConfig)]


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    with checks.fast_compile():
        yield


@contextlib.contextmanager
def quickly():
    """For what is built once and is not under test."""
    with checks.unchecked(), checks.fast_compile():
        yield


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
    with quickly():
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
    """A linear code of the latents, as a codec, with some of them for validation."""
    config = SeedCodecConfig(LATENT, tile=(4, 4), width=8, hidden=8, decoder_blocks=1, snr_steps=3, rate_steps=3)
    statistics = latent_statistics(latents)
    with quickly():
        graph, abstract = nnx.split(nnx.eval_shape(lambda: SeedNetwork(config, nnx.Rngs(0))))
        network = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract))
        network.latent_mean[...], network.basis[...] = statistics.mean, statistics.basis
        network.scale[...] = jnp.sqrt(statistics.variances)
        network.load_logits[...] = jnp.broadcast_to(jnp.log(statistics.variances), network.load_logits.shape)
        for ones in (network.code_std, network.encoder_scale, network.decoder.norm.scale):
            ones[...] = jnp.ones_like(ones[...])
        return SeedCodec(network, latents[:50])


@pytest.fixture(scope="session")
def denoiser(latents, tmp_path_factory):
    """Folder of a codec of the raw latents that takes what it receives for the latent."""
    config = SeedCodecConfig(
        LATENT, (4, 4), width=8, hidden=8, encoder_blocks=0, transform="raw", snr_steps=3, rate_steps=3
    )
    folder = tmp_path_factory.mktemp("denoiser")
    with quickly():
        SeedCodec(initial_network(config, latents)).save_pretrained(folder, np.float32)
    return str(folder)


@pytest.fixture(scope="session")
def source(latents, images):
    """Six images and latents, which have nothing to do with each other."""
    return Source(*(jnp.asarray(x[:6]) for x in (latents, images, latents)))


@pytest.fixture(scope="session")
def table(images):
    """Coded images at three SNRs."""
    choice, rate = jnp.asarray([3, 12, 5]), jnp.asarray([0.5, 0.7, 4.0])
    return ImageCodecTable(jnp.asarray([0.0, 10.0, 20.0]), choice, rate, jnp.asarray(images[:8].mean(0)))


@pytest.fixture(scope="session")
def make(pipe, codec, table, denoiser):
    """`make(scheme, **options)`: a simulator of this pipeline and codec with two denoising steps.

    Options are those of the scheme, of `SystemConfig` and of `make_simulator`. With ones that can be hashed it is made
    once. The errors of a split seed are not measured.
    """
    given = {"num_steps": 2, "statistics": STATISTICS, "guided": False}
    errors = SeedErrors(jnp.asarray([0.0]), jnp.asarray([[0.1, *np.linspace(0.1, 0.01, 16)]], jnp.float32))

    def made(scheme="seed", **options):
        fitted = {"centralized-coded": table, "split-seed": errors}.get(scheme)
        parts = {"codec": codec, "fitted": fitted} | options
        settings = {name: parts.pop(name) for name in CONFIG if name in parts}
        mine = {name: parts.pop(name) for name in OPTIONS if name in parts}
        chosen = find_scheme(scheme, defaults={"rate": 2.0, "folder": denoiser} | mine)
        return make_simulator(pipe, scheme=chosen, config=SystemConfig(**given | settings), **parts)

    kept = functools.cache(made)

    def make(*form, **options):
        try:
            hash(tuple(options.values()))
        except TypeError:
            return made(*form, **options)
        return kept(*form, **options)

    return make


@pytest.fixture(scope="session")
def deliver():
    """`deliver(simulator, source, snr_db, images, realisations, **parts)`: latents or pixels as received, compiled.

    No latent is decoded. `parts` replace a simulator's parameters, such as its fading and its policy.
    """

    @functools.partial(jax.jit, static_argnames="simulator")
    def run(simulator, key, params, source, snr_db, images, realisations):
        ids = jnp.zeros((len(source.latents), 48), jnp.int32)
        found = simulator.deliver(key, params, source, ids, snr_db, images, realisations, generate=False)
        # Left out, the denoising of split latents is not even compiled.
        return found._replace(latents=None) if simulator.link.result == "noisy" else found

    def deliver(simulator, source, snr_db, images=range(6), realisations=range(2), seed=0, **parts):
        numbers = (np.asarray(numbers, np.int32) for numbers in (images, realisations))
        return run(simulator, jax.random.key(seed), simulator.params | parts, source, jnp.float32(snr_db), *numbers)

    return deliver
