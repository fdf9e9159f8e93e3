"""What opens of the folders, files and repositories that people have, and what is said of those that do not."""

import json
import re

import diffusers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megjax.diffusion import layout
from megjax.diffusion.pipeline import StableDiffusion
from megjax.diffusion.samplers import SAMPLERS
from tests.checks import assert_equal_trees
from tests.diffusion.published import SD_15

pytestmark = pytest.mark.usefixtures("module_unchecked")

WEIGHTS = {part: f"{part}/{stem}.safetensors" for part, stem in layout.STEMS.items()}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


def weights_of(taken):
    """Names of the weights that each download took."""
    return [sorted(name for name in names if name.endswith(".safetensors")) for names in taken]


def small_files(whole):
    """Names of a repository's files but for the weights."""
    files = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()]
    return [file for file in files if not file.endswith(".safetensors")]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(model, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        StableDiffusion.from_pretrained(model, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [
        ("0.6.0", 32, 64),  # Stable Diffusion 1.5, as first published
        ("0.8.1", 8, 64),
        ("0.9.0.dev0", 32, 32),
        ("0.10.2", 32, 32),
        ("0.6.0", 96, 96),
        ("0.6.0", [32, 32], (32, 32)),
        ("0.6.0", None, None),
        (None, 32, 32),
    ],
)
def test_sizes_of_old_unets_are_those_of_diffusers(folder, version, size, expected):
    file = folder / "unet" / "config.json"
    values = json.loads(file.read_text()) | {"sample_size": size}
    values |= {} if version is None else {"_diffusers_version": version}
    file.write_text(json.dumps(values))
    assert layout.unet_config(folder, np.float32).sample_size == expected


@pytest.mark.slow
@pytest.mark.parametrize(("version", "expected"), [("0.6.0", 64), ("0.9.0.dev0", 32)])
def test_diffusers_corrects_the_same_sizes(folder, version, expected):
    edit(folder / "unet" / "config.json", sample_size=32, _diffusers_version=version)
    unet = diffusers.UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    unet.register_to_config(_diffusers_version=version)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")) | {"unet": unet}
    parts |= {"scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    assert pipeline.unet.config.sample_size == expected == layout.unet_config(folder, np.float32).sample_size


def test_an_image_to_image_pipeline_of_the_same_parts_opens(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert layout.locate(folder) == folder


def test_a_folder_whose_sampler_is_not_here_opens_and_runs_the_others(folder, tmp_path):
    edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    saved = diffusers.UniPCMultistepScheduler.from_config(SD_15).to_json_string()
    (folder / "scheduler" / "scheduler_config.json").write_text(saved)
    pipe = StableDiffusion.from_pretrained(folder)
    with pytest.raises(ValueError, match="own sampler is 'UniPCMultistepScheduler'; it must be one of .*'ddim'.*"):
        pipe.sampler(num_steps=5)
    assert [pipe.sampler(name, 5).name for name in SAMPLERS.names] == list(SAMPLERS.names)
    pipe.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text())["scheduler"][1] == "UniPCMultistepScheduler"
    reopened = layout.scheduler_config(tmp_path / "copy")
    assert reopened == pipe.configs.scheduler
    assert (
        diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "copy" / "scheduler").config.solver_type == "bh2"
    )


@pytest.mark.parametrize("variant", [pytest.param("fp16", marks=pytest.mark.slow), "non_ema"])
def test_plain_weights_serve_where_there_is_no_variant(folder, variant):
    tensors = load_file(folder / WEIGHTS["unet"])
    save_file(
        {name: 2 * value for name, value in tensors.items()},
        folder / f"unet/{layout.STEMS['unet']}.{variant}.safetensors",
    )
    whole, part = (StableDiffusion.from_pretrained(folder, variant=name) for name in (None, variant))
    assert_equal_trees(part.params["vae"], whole.params["vae"])
    assert_equal_trees(part.params["unet"], jax.tree.map(lambda value: 2 * value, whole.params["unet"]))


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_download_of_a_variant_of_one_part(hub, whole, variant):
    marked = f"unet/{layout.STEMS['unet']}.{variant}.safetensors"
    taken = hub([*small_files(whole), *WEIGHTS.values(), marked])
    found = layout.locate("owner/name", variant)
    assert weights_of(taken) == [[marked], sorted([WEIGHTS["text_encoder"], WEIGHTS["vae"]])]
    assert not (found / WEIGHTS["unet"]).exists()


def test_download_of_an_absent_variant(hub, whole):
    taken = hub([*small_files(whole), *WEIGHTS.values()])
    fails("owner/name", "holds no model.bf16.safetensors or .*no variant 'bf16'", variant="bf16")
    assert weights_of(taken) == [[]]


@pytest.mark.parametrize("name", ["v1-5-pruned-emaonly.safetensors", "owner/name.safetensors", "~/old.ckpt"])
def test_a_single_file_is_named_with_the_way_to_convert_it(name, tmp_path, monkeypatch):
    match = rf"{re.escape(name)}'.* single file; .*folder.*from_single_file\('{re.escape(name)}'\)\.save_pretrained"
    fails(name, match)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"0")
    fails("weights", "single file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"0")
    fails("folder", r"folder, which has no model_index\.json, .*from_single_file\('model\.safetensors'\)")


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/merges.txt", "model_index.json"]
)
def test_a_git_lfs_pointer_is_named_with_the_way_to_fetch_it(folder, file):
    (folder / file).write_bytes(POINTER)
    fails(folder, f"{re.escape(str(folder / file))} is a Git LFS pointer.*git lfs pull")


def test_a_repository_of_pickles_is_refused_with_its_reason(hub, whole):
    bins = [f"{part}/{stem}.bin" for part, stem in layout.STEMS.items()]
    hub([*small_files(whole), *bins])
    fails(
        "owner/name",
        r"^owner/name holds only pickled weights \(.*unet/.*\.bin.*refused.*from_pretrained\('owner/name'\)",
    )
    hub(["README.md", "old.ckpt"])
    fails("owner/name", "'owner/name' is a checkpoint in a single file.*huggingface.co/owner/name/blob/main/old.ckpt")
