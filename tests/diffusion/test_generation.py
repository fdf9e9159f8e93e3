"""Generation itself: batching, retracing, guidance, sizes, bad input, and sampling in two parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import generation, samplers
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.tokenization import train_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL, VAEConfig

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")

STEPS, LIMIT, PIXELS = 4, 16, 16
PROMPTS, NEGATIVE = ["a red house by night", "two boats"], ["a green tree", "fog"]
LATENTS = (len(PROMPTS), PIXELS // 2, PIXELS // 2, 4)
FLOAT32 = 1e-4  # the same computation in another order
# Of most tests, so that they share programs; a solver that remembers nothing.
SAMPLER = "euler_ancestral"
PLAIN, GUIDED = ({"num_steps": STEPS, "sampler": SAMPLER, "guidance_scale": scale} for scale in (1.0, 3.5))


@pytest.fixture(scope="module")
def small(tmp_path_factory, random_params, module_unchecked):
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


@pytest.fixture
def traces(monkeypatch):
    """One entry for each network of each program that is traced."""
    found, merge = [], generation.nnx.merge
    monkeypatch.setattr(generation.nnx, "merge", lambda *args: found.append(args) or merge(*args))
    return found


@pytest.mark.slow
def test_generated_images_are_decoded_latents(small, ids, traces):
    latents = small.generate_latents(jax.random.key(3), ids, **GUIDED)
    assert latents.shape == LATENTS
    images = np.asarray(small.generate(jax.random.key(3), ids, **GUIDED))
    assert images.shape == (len(PROMPTS), PIXELS, PIXELS, 3) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.02
    assert np.abs(small.decode(latents) - images).max() < FLOAT32
    traces.clear()
    small.generate(jax.random.key(4), ids[::-1], small.tokenize(NEGATIVE), **GUIDED | {"guidance_scale": 7.0})
    assert not traces


def test_an_image_does_not_depend_on_the_others(small, ids):
    def latents(ids, seed=1):
        return np.asarray(small.generate_latents(jax.random.key(seed), ids, **GUIDED))

    both, repeated = latents(ids), latents(ids[[0, 0]])
    scale = FLOAT32 * np.abs(both).max()
    assert np.abs(repeated[0] - both[0]).max() < scale
    # Another key or another index in the batch is another image.
    assert np.abs(latents(ids, seed=2) - both).max() > 100 * scale
    assert np.abs(repeated[1] - both[0]).max() > 100 * scale


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_size_of_its_batch(small, ids):
    one, two = (np.asarray(small.generate_latents(jax.random.key(1), ids[:size], **PLAIN)) for size in (1, 2))
    assert np.abs(one[0] - two[0]).max() < FLOAT32 * np.abs(two).max()


def test_a_second_call_never_retraces(small, ids, traces):
    def use(seed, guidance_scale, num):
        prompts = small.tokenize([f"{word} {num}" for word in PROMPTS])
        options = GUIDED | {"guidance_scale": guidance_scale}
        small.encode(small.decode(small.generate_latents(jax.random.key(seed), prompts, **options)))

    use(0, 3.5, 1)
    traces.clear()
    use(1, 7.0, 2)
    assert not traces
    small._decode.lower(small.params, jnp.zeros((3, *LATENTS[1:])), batch_size=None)
    assert traces  # a new shape is traced, and the counter counts


def test_guidance_of_one_is_no_guidance(small, ids):
    key, negative = jax.random.key(0), small.tokenize(NEGATIVE)
    plain = np.asarray(small.generate_latents(key, ids, **PLAIN))
    assert np.array_equal(plain, small.generate_latents(key, ids, negative, **PLAIN | {"guidance_scale": 0.5}))
    # The program of guided images, as `generate_latents` calls it.
    options = {"shape": LATENTS[1:], "initial_noise": None, "sampler_noise": None, "clip_skip": 0}
    options |= {"negative_ids": negative, "guidance_scale": jnp.float32(1.0), "guidance_interval": (0.0, 1.0)}
    guided = small._latents(small.params, small.sampler(SAMPLER, STEPS), key, ids, **options)
    assert np.abs(guided - plain).max() < FLOAT32 * np.abs(plain).max()
    other = small.generate_latents(key, ids, negative, **GUIDED | {"guidance_scale": 20.0})
    assert np.abs(other - plain).max() > 100 * FLOAT32 * np.abs(plain).max()


def test_negative_prompt_defaults_to_the_empty_one(small, ids):
    default, empty, other = (
        np.asarray(small.generate_latents(jax.random.key(0), ids, negative, **GUIDED))
        for negative in (None, small.tokenize(["", ""]), small.tokenize(NEGATIVE))
    )
    assert np.array_equal(default, empty)
    assert not np.array_equal(default, other)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_functions_in_batches(batch_size):
    values, sizes = np.arange(10.0, dtype=np.float32).reshape(5, 2), []

    def double(x):
        sizes.append(len(x))
        return 2 * x.sum(1)

    np.testing.assert_array_equal(generation.in_batches(double, values, batch_size), 2 * values.sum(1))
    assert set(sizes) == {batch_size or 5}


def test_images_of_other_sizes(small, ids):
    assert small.image_size == (PIXELS, PIXELS)
    images = jax.eval_shape(lambda: small.generate(jax.random.key(0), ids, height=6, width=12, **PLAIN))
    assert images.shape == (2, 6, 12, 3)
    assert small.latent_shape(width=12) == (LATENTS[1], 6, 4)


@pytest.mark.slow
def test_bfloat16(small, ids, tmp_path):
    small.save_pretrained(tmp_path)
    low = StableDiffusion.from_pretrained(tmp_path, jnp.bfloat16, param_dtype=jnp.bfloat16)
    images, full = (np.asarray(each.generate(jax.random.key(3), ids, **GUIDED)) for each in (low, small))
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
        small.generate(jax.random.key(0), ids, **options)
    assert "\n" not in str(error.value)


def test_more_bad_input(small, ids):
    with pytest.raises(ValueError, match="decode_batch|batch_size is 0"):
        small.generate(jax.random.key(0), ids, decode_batch=0, **PLAIN)
    with pytest.raises(ValueError, match="batch_size is 0"):
        small.decode(jnp.zeros(LATENTS), batch_size=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        small.encode(jnp.zeros((2, PIXELS, PIXELS, 3)), batch_size=0)
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        small.tokenize([])
    with pytest.raises(ValueError, match="prompts is 'a house'.*not one string"):
        small.tokenize("a house")
    with pytest.raises(TypeError, match="samplr"):
        small.generate(jax.random.key(0), ids, samplr="ddim")


def test_no_size_in_the_config(small):
    unet = dataclasses.replace(small.configs.unet, sample_size=None)
    configs = dataclasses.replace(small.configs, unet=unet)
    pipe = StableDiffusion(configs, small.graphs, small.params, small.tokenizer)
    with pytest.raises(ValueError, match="sample_size is None.*height and width"):
        pipe.latent_shape(height=8)
    assert pipe.latent_shape(8, 16) == (4, 8, 4)


@pytest.mark.slow
def test_finishing_partial_latents_equals_the_whole(small, ids):
    """The latents in between, and those after all steps, are variance preserving, unlike the solver's own."""
    table, key, prompts = small.sampler(SAMPLER, STEPS), jax.random.key(5), jnp.asarray(ids)
    whole = np.asarray(small.generate_latents(key, prompts, **PLAIN))

    @jax.jit
    def parts(params):
        given = {"shape": LATENTS[1:]}
        x, end = (
            generation.generate_latents(small.graphs, params, table, key, prompts, stop=stop, **given)
            for stop in (2, table.num_steps)
        )
        features = generation.prompt_features(small.graphs, params, prompts)
        denoiser = generation.denoiser_for(small.graphs, params, *features, 1.0)
        _, step_keys = generation.image_keys(key, len(prompts))
        return x, end, samplers.denoise(denoiser, table, samplers.from_vp(table, x, 2), start=2, key=step_keys)[0]

    partial, end, finished = map(np.asarray, parts(small.params))
    limit = FLOAT32 * np.abs(whole).max()
    assert np.abs(finished - whole).max() < limit
    assert np.abs(partial - whole).max() > 100 * limit
    scale = np.sqrt(float(samplers.alpha_bar(table, table.num_steps)))
    assert np.abs(end - scale * whole).max() < limit


@pytest.mark.parametrize(
    ("end", "interval", "parts"),
    [
        (4, (0.0, 1.0), [(0, 4, True)]),
        (4, (0.25, 0.75), [(0, 1, False), (1, 3, True), (3, 4, False)]),
        (4, (0.5, 0.5), [(0, 2, False), (2, 4, False)]),
        (2, (0.25, 1.0), [(0, 1, False), (1, 2, True)]),
        (0, (0.0, 1.0), []),
    ],
)
def test_parts_of_a_guidance_interval(end, interval, parts):
    assert generation._guided_parts(end, 4, interval) == parts


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [SAMPLER, "dpm++"])
def test_guidance_in_an_interval_of_steps(small, ids, sampler):
    """Steps 2 and 3 of 4 are guided, and the solver remembers across the ends of the interval."""
    key, prompts = jax.random.key(5), jnp.asarray(ids)
    run = functools.partial(small.generate_latents, key, prompts)
    options = GUIDED | {"sampler": sampler, "guidance_scale": 60.0}
    part = np.asarray(run(guidance_interval=(0.25, 0.75), **options))
    negative = jnp.repeat(jnp.asarray(small.tokenize([""])), len(prompts), axis=0)

    @jax.jit
    def expected(params, key):
        """One function of the timestep, guided in the interval only."""
        features = generation.prompt_features(small.graphs, params, prompts, negative)
        guided = generation.denoiser_for(small.graphs, params, *features, 60.0)
        table = small.sampler(sampler, STEPS)

        def model(x, timestep):
            inside = jnp.any(timestep == jnp.asarray(table.timesteps)[1:3])
            scale = jnp.where(inside, 60.0, 1.0)
            return dataclasses.replace(guided, guidance_scale=scale)(x, timestep)

        noise_keys, step_keys = generation.image_keys(key, len(prompts))
        noise = jax.vmap(lambda key: jax.random.normal(key, LATENTS[1:]))(noise_keys)
        return samplers.denoise(model, table, samplers.scale_initial(table, noise), key=step_keys)[0]

    found = expected(small.params, jax.random.key(5))
    np.testing.assert_allclose(part, found, atol=5 * FLOAT32 * np.abs(part).max())
    if sampler == SAMPLER:
        for scale in (60.0, 1.0):
            other = np.asarray(run(**options | {"guidance_scale": scale}))
            assert np.abs(part - other).max() > 20 * FLOAT32 * np.abs(part).max()


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.5), (float("nan"), 1.0)])
def test_bad_guidance_intervals(small, ids, interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        small.generate(jax.random.key(0), ids, num_steps=2, sampler="ddim", guidance_interval=interval)
