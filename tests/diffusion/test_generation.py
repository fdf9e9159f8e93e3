"""Generation itself: batching, retracing, guidance, sizes, bad input, and sampling in two parts."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import generation, samplers
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.schedules import SchedulerConfig
from megjax.diffusion.tokenization import train_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL, VAEConfig

STEPS, LIMIT, PIXELS = 10, 16, 16
PROMPTS, NEGATIVE = ["a red house by night", "two boats"], ["a green tree", "fog"]
LATENTS = (len(PROMPTS), PIXELS // 2, PIXELS // 2, 4)
FLOAT32 = 1e-4  # the same computation in another order


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def unchecked(function):
    """`function` without the run-time check of its annotations, which only tests have."""
    return inspect.unwrap(function)


@pytest.fixture(scope="module")
def small(tmp_path_factory, random_params):
    """A pipeline of the smallest networks, with random weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer([*PROMPTS, *NEGATIVE] * 5, folder, vocab_size=600, max_tokens=LIMIT)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LIMIT,
    )
    unet = UNetConfig(
        sample_size=LATENTS[1],
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = VAEConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    scheduler = SchedulerConfig(
        "pndm",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        clip_sample=False,
    )
    parts = {
        "text_encoder": random_params(lambda: CLIPTextModel(text, rngs=ShapeRngs())),
        "unet": random_params(lambda: UNet2DConditionModel(unet, rngs=ShapeRngs())),
        "vae": random_params(lambda: AutoencoderKL(vae, rngs=ShapeRngs())),
    }
    graphs = Graphs(**{name: pair[0] for name, pair in parts.items()}, scaling_factor=vae.scaling_factor)
    params = {name: pair[1] for name, pair in parts.items()}
    return StableDiffusion(Configs(text, unet, vae, scheduler), graphs, params, tokenizer)


@pytest.fixture(scope="module")
def ids(small):
    return small.tokenize(PROMPTS)


def test_generated_images_are_finite_and_in_range(small, ids):
    images = np.asarray(small.generate(jax.random.key(1), ids, num_steps=STEPS, sampler="ddim", guidance_scale=3.5))
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.02


def test_an_image_does_not_depend_on_its_batch(small, ids):
    def latents(ids, seed=1):
        key = jax.random.key(seed)
        return np.asarray(small.generate_latents(key, ids, num_steps=STEPS, sampler="euler_ancestral"))

    both = latents(ids)
    scale = FLOAT32 * np.abs(both).max()
    assert np.abs(latents(ids[:1])[0] - both[0]).max() < scale
    assert np.abs(latents(ids[[0, 0]])[0] - both[0]).max() < scale
    # Another key or another index in the batch is another image.
    assert np.abs(latents(ids, seed=2) - both).max() > 100 * scale
    assert np.abs(latents(ids[[0, 0]])[1] - both[0]).max() > 100 * scale


def test_a_second_call_never_retraces(small, ids, monkeypatch):
    def use(seed, guidance_scale, num):
        key = jax.random.key(seed)
        prompts = small.tokenize([f"{word} {num}" for word in PROMPTS])
        options = {"guidance_scale": guidance_scale, "num_steps": STEPS, "sampler": "ddim"}
        latents = small.generate_latents(key, prompts, **options)
        small.generate(key, prompts, small.tokenize(NEGATIVE[::-1]), **options)
        small.encode(small.decode(latents))

    use(0, 3.5, 1)
    traces = []
    merge = generation.nnx.merge
    monkeypatch.setattr(generation.nnx, "merge", lambda *args: traces.append(args) or merge(*args))
    use(1, 7.0, 2)
    assert not traces
    small._decode.lower(small.params, jnp.zeros((3, *LATENTS[1:])), batch_size=None)
    assert traces  # a new shape is traced, and the counter counts


def test_guidance_of_one_is_no_guidance(small, ids):
    key, negative = jax.random.key(0), small.tokenize(NEGATIVE)
    options = {"num_steps": STEPS, "sampler": "ddim"}
    plain = small.generate_latents(key, ids, guidance_scale=1.0, **options)
    assert np.array_equal(plain, small.generate_latents(key, ids, negative, guidance_scale=0.5, **options))
    table = small.sampler("ddim", STEPS)
    settings = {"negative_ids": negative, "shape": LATENTS[1:], "guidance_scale": jnp.float32(1.0)}
    guided = small._latents(
        small.params, table, key, ids, initial_noise=None, sampler_noise=None, clip_skip=0, **settings
    )
    assert np.abs(guided - plain).max() < FLOAT32 * np.abs(plain).max()
    other = small.generate_latents(key, ids, negative, guidance_scale=20.0, **options)
    assert np.abs(other - plain).max() > 100 * FLOAT32 * np.abs(plain).max()


def test_negative_prompt_defaults_to_the_empty_one(small, ids):
    options = {"num_steps": STEPS, "sampler": "ddim", "guidance_scale": 3.5}
    default = small.generate_latents(jax.random.key(0), ids, **options)
    assert np.array_equal(default, small.generate_latents(jax.random.key(0), ids, small.tokenize(["", ""]), **options))
    assert not np.array_equal(
        default, small.generate_latents(jax.random.key(0), ids, small.tokenize(NEGATIVE), **options)
    )


def test_generate_is_latents_then_decode(small, ids):
    options = {"num_steps": STEPS, "sampler": "ddim", "guidance_scale": 3.5}
    latents = small.generate_latents(jax.random.key(3), ids, **options)
    assert latents.shape == LATENTS
    images = small.decode(latents)
    whole = small.generate(jax.random.key(3), ids, **options)
    assert np.abs(images - whole).max() < FLOAT32
    assert np.abs(small.generate(jax.random.key(3), ids, decode_batch=1, **options) - whole).max() < FLOAT32


def test_decoding_and_encoding_in_batches(small):
    latents = jax.random.normal(jax.random.key(0), (5, 4, 6, 4))
    images = small.decode(latents)
    assert images.shape == (5, 8, 12, 3)
    assert np.abs(small.decode(latents, batch_size=2) - images).max() < FLOAT32
    encoded = small.encode(images)
    assert encoded.shape == latents.shape
    assert np.abs(small.encode(images, batch_size=3) - encoded).max() < FLOAT32 * np.abs(encoded).max()


def test_images_of_other_sizes(small, ids):
    assert small.image_size == (PIXELS, PIXELS)
    images = small.generate(jax.random.key(0), ids, num_steps=2, sampler="ddim", height=6, width=12)
    assert images.shape == (2, 6, 12, 3)
    assert np.isfinite(images).all()
    assert small.latent_shape(width=12) == (LATENTS[1], 6, 4)


def test_bfloat16(small, ids, tmp_path):
    small.save_pretrained(tmp_path)
    low = StableDiffusion.from_pretrained(tmp_path, jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low.params))
    options = {"num_steps": STEPS, "sampler": "ddim", "guidance_scale": 3.5}
    images, full = (np.asarray(each.generate(jax.random.key(3), ids, **options)) for each in (low, small))
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    # Guided steps multiply the relative error of one call, which is about 2^-8 a layer: close, but not float32.
    error = np.sqrt(np.mean((images - full) ** 2)) / full.std()
    assert 2.0**-11 < error < 0.25


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "lms"}, "sampler is 'lms'.*ddim.*pndm"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2000, "sampler": "ddim"}, "num_steps=2000"),
        ({"eta": 1.5, "sampler": "ddim"}, r"eta=1\.5"),
        ({"eta": 0.5, "sampler": "euler"}, r"eta=0\.5"),
        ({"height": 15}, "height is 15.*multiple of 2"),
        ({"width": -2}, "width is -2"),
        ({"clip_skip": 2}, r"clip_skip is 2.*\[0, 2\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"initial_noise": jnp.zeros((2, 4, 4, 4))}, "initial_noise's shape"),
        ({"negative_ids": np.zeros((1, LIMIT), np.int32)}, "negative_ids' shape"),
        ({"sampler": "euler_ancestral", "sampler_noise": jnp.zeros((3, *LATENTS))}, "noise of shape"),
    ],
)
def test_bad_options(small, ids, options, match):
    options = {"num_steps": STEPS} | options
    with pytest.raises(ValueError, match=match) as error:
        unchecked(StableDiffusion.generate)(small, jax.random.key(0), ids, **options)
    assert "\n" not in str(error.value)


def test_more_bad_input(small, ids):
    with pytest.raises(ValueError, match="decode_batch|batch_size is 0"):
        small.generate(jax.random.key(0), ids, num_steps=STEPS, sampler="ddim", guidance_scale=3.5, decode_batch=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        small.decode(jnp.zeros(LATENTS), batch_size=0)
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        small.tokenize([])
    with pytest.raises(ValueError, match="prompts is 'a house'.*not one string"):
        unchecked(StableDiffusion.tokenize)(small, "a house")
    with pytest.raises(TypeError, match="samplr"):
        small.generate(jax.random.key(0), ids, samplr="ddim")


def test_no_size_in_the_config(small):
    unet = dataclasses.replace(small.configs.unet, sample_size=None)
    configs = dataclasses.replace(small.configs, unet=unet)
    pipe = StableDiffusion(configs, small.graphs, small.params, small.tokenizer)
    with pytest.raises(ValueError, match="sample_size is None.*height and width"):
        pipe.latent_shape(height=8)
    assert pipe.latent_shape(8, 16) == (4, 8, 4)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral"])
def test_finishing_partial_latents_equals_the_whole(small, ids, sampler):
    """For solvers that remember nothing; the latents in between are variance preserving whatever the solver's space."""
    table, key, prompts = small.sampler(sampler, 4), jax.random.key(5), jnp.asarray(ids)
    whole = small.generate_latents(key, prompts, num_steps=4, sampler=sampler, guidance_scale=1.0)

    @jax.jit
    def halves(params):
        given = {"shape": LATENTS[1:], "stop": 2}
        x = generation.generate_latents(small.graphs, params, table, key, prompts, **given)
        features = generation.prompt_features(small.graphs, params, prompts)
        denoiser = generation.denoiser_for(small.graphs, params, *features, 1.0)
        _, step_keys = generation.image_keys(jax.random.clone(key), len(prompts))
        return x, samplers.denoise(denoiser, table, samplers.from_vp(table, x, 2), start=2, key=step_keys)[0]

    partial, finished = halves(small.params)
    assert np.abs(finished - whole).max() < FLOAT32 * np.abs(whole).max()
    assert np.abs(partial - whole).max() > 100 * FLOAT32 * np.abs(whole).max()


@pytest.mark.parametrize("sampler", ["dpm++", "euler"])
def test_all_steps_are_the_whole(small, ids, sampler):
    table, prompts = small.sampler(sampler, 3), jnp.asarray(ids[:1])
    given = {"shape": LATENTS[1:]}
    run = jax.jit(
        lambda params, stop: generation.generate_latents(
            small.graphs, params, table, jax.random.key(5), prompts, stop=stop, **given
        ),
        static_argnums=1,
    )
    whole, stopped = (run(small.params, stop) for stop in (None, table.num_steps))
    scale = np.sqrt(float(samplers.alpha_bar(table, table.num_steps))) if sampler.startswith("euler") else 1.0
    assert np.abs(stopped - scale * whole).max() < FLOAT32 * np.abs(whole).max()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler_ancestral"])
def test_guidance_in_an_interval_of_steps(small, ids, sampler):
    """Steps 2 and 3 of 4 are guided, and the solver remembers across the ends of the interval."""
    key, prompts = jax.random.key(5), jnp.asarray(ids)
    options = {"num_steps": 4, "sampler": sampler, "guidance_scale": 60.0}
    run = functools.partial(small.generate_latents, key, prompts, **options)
    whole, part, none = (np.asarray(run(guidance_interval=span)) for span in ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5)))
    np.testing.assert_array_equal(whole, run())
    np.testing.assert_allclose(none, run(guidance_scale=1.0), atol=FLOAT32 * np.abs(none).max())
    negative = jnp.repeat(jnp.asarray(small.tokenize([""])), len(prompts), axis=0)

    @jax.jit
    def expected(params, key):
        """One function of the timestep, guided in the interval only."""
        features = generation.prompt_features(small.graphs, params, prompts, negative)
        guided = generation.denoiser_for(small.graphs, params, *features, 60.0)
        plain = generation.denoiser_for(small.graphs, params, features[0], None, 1.0)
        table = small.sampler(sampler, 4)

        def model(x, timestep):
            inside = jnp.any(timestep == jnp.asarray(table.timesteps)[1:3])
            return jnp.where(inside, guided(x, timestep), plain(x, timestep))

        noise_keys, step_keys = generation.image_keys(key, len(prompts))
        noise = jax.vmap(lambda key: jax.random.normal(key, LATENTS[1:]))(noise_keys)
        return samplers.denoise(model, table, samplers.scale_initial(table, noise), key=step_keys)[0]

    found = expected(small.params, jax.random.key(5))
    np.testing.assert_allclose(part, found, atol=5 * FLOAT32 * np.abs(part).max())
    assert min(np.abs(part - other).max() for other in (whole, none)) > 20 * FLOAT32 * np.abs(part).max()


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.5), (float("nan"), 1.0)])
def test_bad_guidance_intervals(small, ids, interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        small.generate(jax.random.key(0), ids, num_steps=2, sampler="ddim", guidance_interval=interval)
