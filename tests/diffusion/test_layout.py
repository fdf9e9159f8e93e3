"""Finding a model and reading its folder: every way in which it can be absent, unsupported or damaged."""

import json
import re
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from megjax.diffusion import layout
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from megjax.diffusion.tokenization import load_tokenizer
from tests.checks import assert_equal_trees

pytestmark = pytest.mark.usefixtures("module_unchecked")

LIMIT = 8  # tokens of the `whole` model
# model_index.json as Stable Diffusion 1.5 was published.
SD_15_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# The files of a repository of the hub, as Stable Diffusion 1.5's.
HUB_FILES = [
    ".gitattributes",
    "README.md",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/pytorch_model.bin",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.fp16.bin",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
HUB_WEIGHTS = {
    "text_encoder": "text_encoder/model",
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
}


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def fails(folder, match):
    with pytest.raises(ValueError, match=match) as error:
        StableDiffusion.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_whole_folder_opens(whole):
    assert layout.locate(whole) == whole
    model = StableDiffusion.from_pretrained(str(whole))
    assert model.configs.text_encoder.max_position_embeddings == LIMIT
    assert model.image_size == (8, 8)
    assert model.tokenize(["a red house"]).shape == (1, LIMIT)


def test_fp16_and_bfloat16_folders_open(whole, tmp_path):
    model = StableDiffusion.from_pretrained(whole)
    for dtype in (np.float16, jax.numpy.bfloat16):
        name = np.dtype(dtype).name
        model.save_pretrained(tmp_path / name, dtype=dtype, variant="fp16")
        again = StableDiffusion.from_pretrained(tmp_path / name)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(again.params))
        rounded = jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(dtype).astype(np.float32), model.params)
        assert_equal_trees(again.params, rounded)


def test_parameters_and_activations_take_the_types_asked_for(whole):
    low = StableDiffusion.from_pretrained(whole, jax.numpy.bfloat16, param_dtype=jax.numpy.bfloat16)
    assert all(leaf.dtype == jax.numpy.bfloat16 for leaf in jax.tree.leaves(low.params))
    assert low.configs.unet.dtype == low.configs.text_encoder.dtype == low.configs.vae.dtype == jax.numpy.bfloat16


def test_sd_15_index_is_accepted(folder):
    (folder / "model_index.json").write_text(json.dumps(SD_15_INDEX))
    assert layout.locate(folder) == folder
    edit(folder / "model_index.json", requires_safety_checker=True, tokenizer=["transformers", "CLIPTokenizerFast"])
    assert layout.locate(folder) == folder


def test_written_index_names_every_component(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert {part: index[part] for part in layout.COMPONENTS} == {part: SD_15_INDEX[part] for part in layout.COMPONENTS}


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such", "~/no such", "scene", "a/b/c", "sceens"])
def test_no_such_model(name):
    fails(name, f"model {re.escape(repr(name))} is no folder")


def test_folder_without_index(tmp_path, monkeypatch):
    fails(tmp_path, r"model_index\.json does not exist")
    monkeypatch.chdir(tmp_path)
    fails("", r"model_index\.json does not exist")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "unknown component 'text_encoder_2'"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "unknown component 'controlnet'"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder.*T5EncoderModel.*CLIPTextModel"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet.*UNet2DModel.*UNet2DConditionModel"),
        ({"vae": [None, None]}, r"vae is \[None, None\]"),
        ({"vae": None}, "vae is None"),
        ({"unet": "absent"}, r"missing components is \['unet'\]"),
        ({"scheduler": "absent"}, r"missing components is \['scheduler'\]"),
        ({"scheduler": ["mine", "PNDMScheduler"]}, "scheduler is .*mine.*name of a scheduler class"),
        ({"scheduler": ["diffusers", "PNDM"]}, "_class_name='PNDM'"),
        ({"_class_name": "StableDiffusionLDM3DPipeline"}, "LDM3DPipeline'; it must be .*'StableDiffusionPipeline'"),
        ({"_class_name": "absent"}, "_class_name is None; it must be"),
        ({"scheduler": None}, "scheduler is None"),
    ],
)
def test_unsupported_pipelines(folder, changes, match):
    edit(folder / "model_index.json", **changes)
    fails(folder, match)


def test_the_index_names_the_sampler_as_in_diffusers(folder):
    for method in SAMPLERS:
        edit(folder / "model_index.json", scheduler=["diffusers", method.class_name])
        config = layout.scheduler_config(layout.locate(folder))
        assert (config.sampler, config.skip_prk_steps, config.beta_end) == (method.name, True, 0.012)


def test_diffusers_overrides_of_old_scheduler_settings(folder):
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    config = layout.scheduler_config(folder)
    assert (config.steps_offset, config.clip_sample) == (1, False)


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("unet/config.json", {"cross_attention_dim": 16}, "hidden_size.*8.*cross_attention_dim, 16"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels.*16.*in_channels, 4"),
        ("unet/config.json", {"in_channels": 9}, "latent_channels.*4.*in_channels, 9"),
        ("unet/config.json", {"out_channels": 8}, "out_channels.*8.*in_channels, 4"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"warp": 9}, "warp"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act.*relu"),
        ("text_encoder/config.json", {"vocab_size": 500}, r"text_encoder/.* does not fit.*token_embedding"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type.*flow"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "beta_schedule.*cosine"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": LIMIT + 1}, "model_max_length is 9.*at most 8"),
    ],
)
def test_settings_that_do_not_fit(folder, file, changes, match):
    edit(folder / file, **changes)
    fails(folder, match)


def test_more_tokens_than_embeddings(whole):
    model = StableDiffusion.from_pretrained(whole)
    tokenizer = load_tokenizer(whole / "tokenizer")
    tokenizer.add_tokens(["<concept>"])
    with pytest.raises(ValueError, match=r"tokens.*must be at most \d+ \(vocab_size\)"):
        StableDiffusion(model.configs, model.graphs, model.params, tokenizer)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "scheduler"])
@pytest.mark.parametrize(
    ("content", "match"), [("{", "is not valid JSON"), ("[]", "must be an object"), (None, "does not exist")]
)
def test_damaged_configs(folder, part, content, match):
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    fails(folder, f"{re.escape(str(file))}.*{match}")


def test_damaged_index(folder):
    (folder / "model_index.json").write_bytes(b"\xff\xfe\x00")
    fails(folder, r"model_index\.json is not valid JSON")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_damaged_weights(folder, part):
    file = folder / part / f"{layout.STEMS[part]}.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    fails(folder, f"{re.escape(str(file))} is not a whole safetensors file")
    file.rename(file.with_name("pytorch_model.bin"))
    fails(folder, "pickled")
    shutil.rmtree(folder / part)
    fails(folder, f"{re.escape(str(folder / part))}")


def test_tokenizer_damaged_or_absent(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    fails(folder, "no readable CLIP tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()
    fails(folder, r"missing is \['merges\.txt'\]")
    shutil.rmtree(folder / "tokenizer")
    fails(folder, "tokenizer: missing")


def test_tokenizer_in_one_file(folder, whole):
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    prompts = ["a red house", "it's 12 o'clock"]
    expected = load_tokenizer(whole / "tokenizer")(prompts)["input_ids"]
    assert StableDiffusion.from_pretrained(folder).tokenizer(prompts)["input_ids"] == expected


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_download_takes_one_set_of_weights(hub, variant):
    taken = hub(HUB_FILES)
    model = StableDiffusion.from_pretrained("owner/name", variant=variant)
    assert model.configs.unet.cross_attention_dim == 8
    mark = f".{variant}" if variant else ""
    weights = sorted(f"{stem}{mark}.safetensors" for stem in HUB_WEIGHTS.values())
    assert len(taken) == 1
    assert sorted(name for name in taken[0] if name.endswith(".safetensors")) == weights
    assert not [name for name in taken[0] if name.endswith((".bin", ".ckpt", ".md"))]
    assert {"model_index.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= set(taken[0])


def test_download_of_shards(hub):
    shards = {
        variant: [
            f"unet/diffusion_pytorch_model.safetensors.index{dot}.json",
            f"unet/diffusion_pytorch_model{dot}-00001-of-00002.safetensors",
            f"unet/diffusion_pytorch_model-00002-of-00002{dot}.safetensors",
        ]
        for variant, dot in ((None, ""), ("fp16", ".fp16"))
    }
    for variant, names in shards.items():
        taken = hub([*HUB_FILES, *shards[None], *shards["fp16"]])
        layout.locate("owner/name", variant)
        other = shards["fp16" if variant is None else None]
        assert set(names) <= set(taken[0])
        assert not {name for name in other if name.endswith(".safetensors")} & set(taken[0])


def test_download_of_a_repository_with_fp16_weights_only(hub):
    full = {f"{stem}.safetensors" for stem in HUB_WEIGHTS.values()}
    taken = hub([name for name in HUB_FILES if name not in full])
    assert StableDiffusion.from_pretrained("owner/name").configs.unet.cross_attention_dim == 8
    assert {f"{stem}.fp16.safetensors" for stem in HUB_WEIGHTS.values()} <= set(taken[-1])


def test_no_network(monkeypatch):
    def snapshot_download(*args, **options):
        raise OSError("cannot reach the hub\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fails("owner/name", "'owner/name'.*cannot reach the hub$")


@pytest.mark.parametrize("option", ["dtype", "param_dtype"])
def test_unsupported_dtypes(whole, option):
    with pytest.raises(ValueError, match=f"^{option} is 'int8'"):
        StableDiffusion.from_pretrained(whole, **{option: np.int8})


def test_unknown_variant(whole):
    with pytest.raises(ValueError, match=r"holds no model\.fp32\.safetensors"):
        StableDiffusion.from_pretrained(whole, variant="fp32")
