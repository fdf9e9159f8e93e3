"""The pipeline against PyTorch diffusers' own, from the same noise; batching, retracing, bad input, split sampling."""

import dataclasses
import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megjax
from megjax.diffusion import generation, samplers
from megjax.diffusion.pipeline import FlaxStableDiffusion, StableDiffusion
from megjax.diffusion.schedules import CLASS_NAMES, SAMPLERS
from megjax.diffusion.tokenization import train_tokenizer

STEPS, LIMIT, PIXELS = 10, 16, 16
PROMPTS, NEGATIVE = ["a red house by night", "two boats"], ["a green tree", "fog"]
LATENTS = (len(PROMPTS), PIXELS // 2, PIXELS // 2, 4)
TOLERANCE = 2e-3  # largest absolute error of an image in [0, 1] after all steps
FLOAT32 = 1e-4  # the same computation in another order
SD_15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
# Name, sampler, further settings of its scheduler class, eta.
CASES = [
    ("ddim", "ddim", {}, 0.0),
    ("ddim, eta 0.6", "ddim", {}, 0.6),
    ("pndm", "pndm", {}, 0.0),
    ("euler", "euler", {}, 0.0),
    ("euler_ancestral", "euler_ancestral", {}, 0.0),
    ("dpm++", "dpm++", {}, 0.0),
    ("dpm++, Karras", "dpm++", {"use_karras_sigmas": True}, 0.0),
]
PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_torch_pipeline(tokenizer, prediction_type):
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LIMIT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=LATENTS[1],
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    with torch.no_grad():
        # As drawn, the U-Net's output is small beside the noise and hardly depends on the prompt.
        unet.conv_out.weight.mul_(4.0)
        for name, value in unet.named_parameters():
            if "attn2" in name and value.ndim == 2:
                value.mul_(3.0)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler.from_config(SD_15 | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unchecked(function):
    """`function` without the run-time check of its annotations, which only tests have."""
    return inspect.unwrap(function)


def share_programs(pipeline, compiled):
    """Let `pipeline` run the programs that `compiled`, another of the same networks, has compiled."""
    assert pipeline.graphs == compiled.graphs
    for name in ("_image", "_latents", "_decode", "_encode"):
        setattr(pipeline, name, getattr(compiled, name))
    return pipeline


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By prediction type: a torch pipeline, the folder it was saved to, and what we load from there."""
    import torch

    torch.set_num_threads(1)
    words = [*PROMPTS, *NEGATIVE] * 5
    tokenizer = train_tokenizer(words, tmp_path_factory.mktemp("tokenizer"), vocab_size=600, max_tokens=LIMIT)
    made = {}
    for prediction_type in PREDICTIONS:
        reference = make_torch_pipeline(tokenizer, prediction_type)
        folder = tmp_path_factory.mktemp(prediction_type)
        reference.save_pretrained(folder)
        made[prediction_type] = reference, folder, StableDiffusion.from_pretrained(folder)
    share_programs(made["v_prediction"][2], made["epsilon"][2])
    return made


@pytest.fixture(scope="module")
def pipe(pairs):
    return pairs["epsilon"][2]


@pytest.fixture(scope="module")
def ids(pipe):
    return pipe.tokenize(PROMPTS)


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(0)
    initial = rng.standard_normal(LATENTS, np.float32)
    return initial, rng.standard_normal((STEPS, *LATENTS), np.float32)


def torch_images(reference, scheduler, noise, eta, monkeypatch, guidance_scale=3.5):
    """Images of a torch pipeline from `noise`, the noise of stochastic samplers included."""
    import torch
    from diffusers.schedulers import scheduling_ddim, scheduling_euler_ancestral_discrete

    initial, later = (torch.tensor(np.moveaxis(part, -1, -3).copy()) for part in noise)
    draws = iter(later)
    for module in (scheduling_ddim, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(draws))
    reference.scheduler = scheduler
    images = reference(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=initial,
        eta=eta,
        output_type="np",
    ).images
    return images, STEPS - len(list(draws))


def our_images(pipe, noise, sampler=None, eta=0.0, guidance_scale=3.5, **options):
    """Images of our pipeline from the same noise."""
    stochastic = sampler == "euler_ancestral" or eta > 0
    return pipe.generate(
        jax.random.key(0),
        pipe.tokenize(PROMPTS),
        pipe.tokenize(NEGATIVE),
        num_steps=STEPS,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        initial_noise=jnp.asarray(noise[0]),
        sampler_noise=jnp.asarray(noise[1]) if stochastic else None,
        **options,
    )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("name", "sampler", "settings", "eta"), CASES, ids=[case[0] for case in CASES])
def test_images_match_diffusers(
    pairs, noise, prediction_type, name, sampler, settings, eta, monkeypatch, record_property
):
    import diffusers

    reference, folder, pipe = pairs[prediction_type]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, CLASS_NAMES[sampler]).from_config(config, **settings)
    expected, drawn = torch_images(reference, scheduler, noise, eta, monkeypatch)
    assert (drawn > 0) == (sampler == "euler_ancestral" or eta > 0)
    if settings:
        schedule = dataclasses.replace(pipe.configs.scheduler, **settings)
        configs = dataclasses.replace(pipe.configs, scheduler=schedule)
        pipe = share_programs(StableDiffusion(configs, pipe.graphs, pipe.params, pipe.tokenizer), pipe)
    images = np.asarray(our_images(pipe, noise, sampler, eta))
    assert images.shape == expected.shape == (len(PROMPTS), PIXELS, PIXELS, 3)
    # Neither flat nor saturated: the comparison means something.
    assert expected.std() > 0.02
    assert np.mean((expected > 0) & (expected < 1)) > 0.9
    error = np.abs(images - expected).max()
    record_property("largest_error", float(error))
    assert error <= TOLERANCE


def test_the_comparison_notices_prompt_guidance_and_sampler(pairs, noise):
    pipe = pairs["epsilon"][2]
    images = np.asarray(our_images(pipe, noise, "ddim"))
    others = {
        "guidance": our_images(pipe, noise, "ddim", guidance_scale=2.5),
        "sampler": our_images(pipe, noise, "pndm"),
        "prediction type": our_images(pairs["v_prediction"][2], noise, "ddim"),
        "noise": our_images(pipe, (noise[0] * 1.01, noise[1]), "ddim"),
    }
    for what, other in others.items():
        assert np.abs(images - np.asarray(other)).max() > 2 * TOLERANCE, what


def test_the_default_sampler_is_the_checkpoints(pairs, noise):
    pipe = pairs["epsilon"][2]
    assert pipe.configs.scheduler.sampler == "pndm"
    assert np.array_equal(our_images(pipe, noise), our_images(pipe, noise, "pndm"))


@pytest.mark.parametrize(("variant", "dtype"), [(None, np.float32), ("fp16", np.float16)])
def test_saved_folder_opens_in_diffusers(pairs, pipe, noise, tmp_path, variant, dtype, monkeypatch):
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipe.save_pretrained(tmp_path, dtype=dtype, variant=variant)
    again = share_programs(StableDiffusion.from_pretrained(tmp_path, variant=variant), pipe)
    assert again.configs == pipe.configs
    assert np.array_equal(again.tokenize(PROMPTS), pipe.tokenize(PROMPTS))
    images = our_images(again, noise)
    if variant is None:
        for mine, theirs in zip(jax.tree.leaves(pipe.params), jax.tree.leaves(again.params), strict=True):
            assert np.array_equal(mine, theirs)
        assert np.array_equal(images, our_images(pipe, noise))
    reference = StableDiffusionPipeline.from_pretrained(
        tmp_path, variant=variant, torch_dtype=torch.float32, use_safetensors=True
    )
    assert isinstance(reference.scheduler, PNDMScheduler)
    reference.set_progress_bar_config(disable=True)
    expected, _ = torch_images(reference, reference.scheduler, noise, 0.0, monkeypatch)
    assert np.abs(np.asarray(images) - expected).max() <= TOLERANCE


def test_generated_images_are_finite_and_in_range(pipe, ids):
    images = np.asarray(pipe.generate(jax.random.key(1), ids, num_steps=STEPS, sampler="ddim", guidance_scale=3.5))
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.02


def test_an_image_does_not_depend_on_its_batch(pipe, ids):
    def latents(ids, seed=1):
        key = jax.random.key(seed)
        return np.asarray(pipe.generate_latents(key, ids, num_steps=STEPS, sampler="euler_ancestral"))

    both = latents(ids)
    scale = FLOAT32 * np.abs(both).max()
    assert np.abs(latents(ids[:1])[0] - both[0]).max() < scale
    assert np.abs(latents(ids[[0, 0]])[0] - both[0]).max() < scale
    # Another key or another index in the batch is another image.
    assert np.abs(latents(ids, seed=2) - both).max() > 100 * scale
    assert np.abs(latents(ids[[0, 0]])[1] - both[0]).max() > 100 * scale


def test_a_second_call_never_retraces(pipe, ids, noise, monkeypatch):
    def use(seed, guidance_scale, num):
        key = jax.random.key(seed)
        prompts = pipe.tokenize([f"{word} {num}" for word in PROMPTS])
        options = {"guidance_scale": guidance_scale, "num_steps": STEPS, "sampler": "ddim"}
        latents = pipe.generate_latents(key, prompts, **options)
        pipe.generate(key, prompts, pipe.tokenize(NEGATIVE[::-1]), **options)
        pipe.encode(pipe.decode(latents))

    use(0, 3.5, 1)
    traces = []
    merge = generation.nnx.merge
    monkeypatch.setattr(generation.nnx, "merge", lambda *args: traces.append(args) or merge(*args))
    use(1, 7.0, 2)
    assert not traces
    pipe.decode(jnp.zeros((3, *LATENTS[1:])))
    assert traces  # a new shape is traced, and the counter counts


def test_guidance_of_one_is_no_guidance(pipe, ids, noise):
    key, negative = jax.random.key(0), pipe.tokenize(NEGATIVE)
    options = {"num_steps": STEPS, "sampler": "ddim"}
    plain = pipe.generate_latents(key, ids, guidance_scale=1.0, **options)
    assert np.array_equal(plain, pipe.generate_latents(key, ids, negative, guidance_scale=0.5, **options))
    table = pipe.sampler("ddim", STEPS)
    settings = {"negative_ids": negative, "shape": LATENTS[1:], "guidance_scale": jnp.float32(1.0)}
    guided = pipe._latents(
        pipe.params, table, key, ids, initial_noise=None, sampler_noise=None, clip_skip=0, **settings
    )
    assert np.abs(guided - plain).max() < FLOAT32 * np.abs(plain).max()
    other = pipe.generate_latents(key, ids, negative, guidance_scale=2.0, **options)
    assert np.abs(other - plain).max() > 100 * FLOAT32 * np.abs(plain).max()


def test_negative_prompt_defaults_to_the_empty_one(pipe, ids):
    options = {"num_steps": STEPS, "sampler": "ddim", "guidance_scale": 3.5}
    default = pipe.generate_latents(jax.random.key(0), ids, **options)
    assert np.array_equal(default, pipe.generate_latents(jax.random.key(0), ids, pipe.tokenize(["", ""]), **options))
    assert not np.array_equal(
        default, pipe.generate_latents(jax.random.key(0), ids, pipe.tokenize(NEGATIVE), **options)
    )


def test_generate_is_latents_then_decode(pipe, ids, noise):
    options = {"num_steps": STEPS, "sampler": "ddim", "guidance_scale": 3.5}
    latents = pipe.generate_latents(jax.random.key(3), ids, **options)
    assert latents.shape == LATENTS
    images = pipe.decode(latents)
    whole = pipe.generate(jax.random.key(3), ids, **options)
    assert np.abs(images - whole).max() < FLOAT32
    assert np.abs(pipe.generate(jax.random.key(3), ids, decode_batch=1, **options) - whole).max() < FLOAT32


def test_decoding_and_encoding_in_batches(pipe):
    latents = jax.random.normal(jax.random.key(0), (5, 4, 6, 4))
    images = pipe.decode(latents)
    assert images.shape == (5, 8, 12, 3)
    assert np.abs(pipe.decode(latents, batch_size=2) - images).max() < FLOAT32
    assert np.abs(pipe.decode(latents, batch_size=5) - images).max() < FLOAT32
    encoded = pipe.encode(images)
    assert encoded.shape == latents.shape
    assert np.abs(pipe.encode(images, batch_size=3) - encoded).max() < FLOAT32 * np.abs(encoded).max()


def test_decode_matches_diffusers_scaling(pairs):
    import torch

    reference, _, pipe = pairs["epsilon"]
    latents = np.random.default_rng(1).standard_normal((1, *LATENTS[1:])).astype(np.float32)
    with torch.no_grad():
        scaled = torch.tensor(latents.transpose(0, 3, 1, 2)) / reference.vae.config.scaling_factor
        decoded = reference.vae.decode(scaled).sample
        expected = reference.image_processor.postprocess(decoded, output_type="np")
        encoded = reference.vae.encode(decoded).latent_dist.mean * reference.vae.config.scaling_factor
    assert np.abs(pipe.decode(jnp.asarray(latents)) - expected).max() < FLOAT32
    image = jnp.asarray(decoded.numpy().transpose(0, 2, 3, 1) / 2 + 0.5)
    assert np.abs(pipe.encode(image) - encoded.numpy().transpose(0, 2, 3, 1)).max() < FLOAT32


def test_images_of_other_sizes(pipe, ids):
    assert pipe.image_size == (PIXELS, PIXELS)
    images = pipe.generate(jax.random.key(0), ids, num_steps=2, sampler="ddim", height=6, width=12)
    assert images.shape == (2, 6, 12, 3)
    assert np.isfinite(images).all()
    assert pipe.latent_shape(width=12) == (LATENTS[1], 6, 4)


def test_bfloat16(pairs, noise):
    _, folder, pipe = pairs["epsilon"]
    low = StableDiffusion.from_pretrained(folder, jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low.params))
    images, full = (np.asarray(our_images(each, noise, "ddim")) for each in (low, pipe))
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    # Ten guided steps multiply the relative error of one call, about 2^-8 a layer: close, but not float32.
    error = np.sqrt(np.mean((images - full) ** 2)) / full.std()
    assert 2.0**-11 < error < 0.25


def test_clip_skip_takes_an_earlier_layer(pairs):
    import torch

    reference, _, pipe = pairs["epsilon"]
    ids = pipe.tokenize(PROMPTS)
    with torch.no_grad():
        features = reference.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=1)[0]
    ours = generation.encode_prompts(pipe.graphs, pipe.params, jnp.asarray(ids), clip_skip=1)
    assert np.abs(ours - features.numpy()).max() < FLOAT32


def test_long_prompts_are_cut_as_in_diffusers(pairs):
    import torch

    reference, _, pipe = pairs["epsilon"]
    prompts = [" ".join(["a red house by night"] * 5), "two boats"]
    with pytest.warns(UserWarning, match=f"cut at {LIMIT}; lost: "):
        ids = pipe.tokenize(prompts)
    seen = []
    handle = reference.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        reference.encode_prompt(prompts, "cpu", 1, False)
    handle.remove()
    assert np.array_equal(ids, seen[0].numpy())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "lms"}, "sampler is 'lms'.*ddim.*pndm"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.5}, r"num_steps is 2\.5"),
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
def test_bad_options(pipe, ids, options, match):
    options = {"num_steps": STEPS} | options
    with pytest.raises(ValueError, match=match) as error:
        unchecked(StableDiffusion.generate)(pipe, jax.random.key(0), ids, **options)
    assert "\n" not in str(error.value)


def test_more_bad_input(pipe, ids):
    with pytest.raises(ValueError, match="decode_batch|batch_size is 0"):
        pipe.generate(jax.random.key(0), ids, num_steps=STEPS, sampler="ddim", guidance_scale=3.5, decode_batch=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe.decode(jnp.zeros(LATENTS), batch_size=0)
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        pipe.tokenize([])
    with pytest.raises(ValueError, match="prompts is 'a house'.*not one string"):
        unchecked(StableDiffusion.tokenize)(pipe, "a house")
    with pytest.raises(TypeError, match="samplr"):
        pipe.generate(jax.random.key(0), ids, samplr="ddim")


def test_no_size_in_the_config(pairs, tmp_path):
    _, folder, _ = pairs["epsilon"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    pipe = StableDiffusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sample_size is None.*height and width"):
        pipe.latent_shape(height=8)
    assert pipe.latent_shape(8, 16) == (4, 8, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_split_sampling_equals_the_whole(pipe, ids, sampler):
    table, key, prompts = pipe.sampler(sampler, 4), jax.random.key(5), jnp.asarray(ids[:1])
    whole = pipe.generate_latents(key, prompts, num_steps=4, sampler=sampler, guidance_scale=1.0)
    noise_keys, _ = generation.image_keys(key, 1)
    x = samplers.scale_initial(table, jax.vmap(lambda k: jax.random.normal(k, LATENTS[1:]))(noise_keys))

    @jax.jit
    def split(params, x):
        options = {"key": jax.random.key(5)}
        x, state = generation.continue_latents(pipe.graphs, params, table, x, prompts, start=0, stop=2, **options)
        rest = generation.continue_latents(pipe.graphs, params, table, x, prompts, start=2, state=state, **options)[0]
        fresh = generation.continue_latents(pipe.graphs, params, table, x, prompts, start=2, **options)[0]
        return rest, fresh

    rest, fresh = split(pipe.params, x)
    assert np.abs(rest - whole).max() < FLOAT32 * np.abs(whole).max()
    # A restarted solver of many steps has forgotten something; the others have nothing to forget.
    forgets = np.abs(fresh - whole).max() > 10 * FLOAT32 * np.abs(whole).max()
    assert forgets == (sampler in ("pndm", "dpm++"))


def test_names():
    assert FlaxStableDiffusion is StableDiffusion
    assert megjax.StableDiffusion is megjax.FlaxStableDiffusion is StableDiffusion
    assert {"StableDiffusion", "FlaxStableDiffusion"} <= set(dir(megjax))
