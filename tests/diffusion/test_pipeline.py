"""The pipeline against PyTorch diffusers' own, from the same noise."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_euler_ancestral_discrete
from transformers import CLIPTextConfig, CLIPTextModel

import megjax
from megjax.diffusion.pipeline import FlaxStableDiffusion, StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from megjax.diffusion.tokenization import train_tokenizer
from tests.checks import assert_equal_trees
from tests.diffusion.published import SD_15

pytestmark = [
    pytest.mark.usefixtures("fast_compile"),
    # diffusers makes NumPy arrays of tensors.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

STEPS, LIMIT, PIXELS = 6, 16, 16
PROMPTS, NEGATIVE = ["a red house by night", "two boats"], ["a green tree", "fog"]
LATENTS = (len(PROMPTS), PIXELS // 2, PIXELS // 2, 4)
TOLERANCE = 2e-3  # largest absolute error of an image in [0, 1] after all steps
FLOAT32 = 1e-4  # the same computation in another order
# Name, prediction type, sampler, further settings of its scheduler class, eta.
FAST_CASES = [
    ("pndm", "epsilon", "pndm", {}, 0.0),
    ("pndm, velocity", "v_prediction", "pndm", {}, 0.0),
]
SLOW_CASES = [
    ("euler_ancestral", "v_prediction", "euler_ancestral", {}, 0.0),
    ("ddim, eta 0.6", "epsilon", "ddim", {}, 0.6),
    ("euler", "v_prediction", "euler", {}, 0.0),
    ("dpm++", "epsilon", "dpm++", {}, 0.0),
    ("dpm++, Karras", "v_prediction", "dpm++", {"use_karras_sigmas": True}, 0.0),
]
CASES = [pytest.param(*case[1:], id=case[0]) for case in FAST_CASES]
CASES += [pytest.param(*case[1:], id=case[0], marks=pytest.mark.slow) for case in SLOW_CASES]
PREDICTIONS = ("epsilon", "v_prediction")


def make_torch_pipeline(tokenizer, prediction_type):
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
    unet = diffusers.UNet2DConditionModel(
        sample_size=LATENTS[1],
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
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
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler.from_config(SD_15 | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def share_programs(pipeline, compiled):
    """Let `pipeline` run the programs that `compiled`, another of the same networks, has compiled."""
    assert pipeline.graphs == compiled.graphs
    for name in ("_image", "_latents", "_decode", "_encode"):
        setattr(pipeline, name, getattr(compiled, name))
    return pipeline


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By prediction type: a torch pipeline, the folder it was saved to, and what we load from there."""
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
def noise():
    rng = np.random.default_rng(0)
    initial = rng.standard_normal(LATENTS, np.float32)
    return initial, rng.standard_normal((STEPS, *LATENTS), np.float32)


def torch_images(reference, scheduler, noise, eta, monkeypatch, guidance_scale=3.5):
    """Images of a torch pipeline from `noise`, the noise of stochastic samplers included."""
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


@pytest.mark.parametrize(("prediction_type", "sampler", "settings", "eta"), CASES)
def test_images_match_diffusers(pairs, noise, prediction_type, sampler, settings, eta, monkeypatch):
    reference, folder, pipe = pairs[prediction_type]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, SAMPLERS.find(sampler).class_name).from_config(config, **settings)
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
    assert np.abs(images - expected).max() <= TOLERANCE


def test_the_comparison_notices_guidance_prediction_type_and_noise(pairs, pipe, noise):
    """And the sampler is the checkpoint's where none is named."""
    assert pipe.configs.scheduler.sampler == "pndm"
    images = np.asarray(our_images(pipe, noise))
    assert np.array_equal(images, our_images(pipe, noise, "pndm"))
    others = {
        "guidance": our_images(pipe, noise, guidance_scale=2.5),
        "prediction type": our_images(pairs["v_prediction"][2], noise),
        "noise": our_images(pipe, (noise[0] * 1.01, noise[1])),
    }
    for what, other in others.items():
        assert np.abs(images - np.asarray(other)).max() > 2 * TOLERANCE, what


@pytest.mark.parametrize(("variant", "dtype"), [(None, np.float32), ("fp16", np.float16)])
def test_saved_folder_opens_in_diffusers(pipe, noise, tmp_path, variant, dtype, monkeypatch):
    pipe.save_pretrained(tmp_path, dtype=dtype, variant=variant)
    again = share_programs(StableDiffusion.from_pretrained(tmp_path, variant=variant), pipe)
    assert again.configs == pipe.configs
    assert np.array_equal(again.tokenize(PROMPTS), pipe.tokenize(PROMPTS))
    images = our_images(again, noise)
    if variant is None:
        assert_equal_trees(pipe.params, again.params)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, use_safetensors=True).to(
        torch.float32
    )
    assert isinstance(reference.scheduler, diffusers.PNDMScheduler)
    reference.set_progress_bar_config(disable=True)
    expected, _ = torch_images(reference, reference.scheduler, noise, 0.0, monkeypatch)
    assert np.abs(np.asarray(images) - expected).max() <= TOLERANCE


def test_decode_matches_diffusers_scaling(pairs):
    reference, _, pipe = pairs["epsilon"]
    latents = np.random.default_rng(1).standard_normal((1, *LATENTS[1:])).astype(np.float32)
    with torch.no_grad():
        scaled = torch.tensor(latents.transpose(0, 3, 1, 2)) / reference.vae.config.scaling_factor
        decoded = reference.vae.decode(scaled).sample.clamp(-1, 1)
        expected = reference.image_processor.postprocess(decoded, output_type="np")
        encoded = reference.vae.encode(decoded).latent_dist.mean * reference.vae.config.scaling_factor
    assert np.abs(pipe.decode(jnp.asarray(latents)) - expected).max() < FLOAT32
    image = jnp.asarray(decoded.numpy().transpose(0, 2, 3, 1) / 2 + 0.5)
    assert np.abs(pipe.encode(image) - encoded.numpy().transpose(0, 2, 3, 1)).max() < FLOAT32


def test_long_prompts_are_cut_as_in_diffusers(pairs):
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


def test_names():
    assert FlaxStableDiffusion is StableDiffusion
    assert megjax.StableDiffusion is megjax.FlaxStableDiffusion is StableDiffusion
    assert {"StableDiffusion", "FlaxStableDiffusion"} <= set(dir(megjax))
