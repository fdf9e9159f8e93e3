"""The diffusers folder layout: finding a model, reading and writing its components."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megjax.configs import read_json, require, write_json
from megjax.diffusion import checkpoint
from megjax.diffusion.checkpoint import PICKLES
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.scheduler_config import SchedulerConfig
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("scenes",)
# Pipelines of the same parts.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
SINGLE_FILES = (".safetensors", *PICKLES)
COMPONENTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
# Parts of a pipeline folder that take no part in turning text into an image.
UNUSED = ("feature_extractor", "safety_checker", "requires_safety_checker", "image_encoder")
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def locate(path_or_hub_id: str | Path, variant: str | None = None) -> Path:
    """The folder of a bundled model, of a local one, or of one downloaded from the hub.

    Raises ValueError if there is none, if it is a single file, or if its model_index.json describes another kind of
    pipeline.
    """
    name = str(path_or_hub_id)
    if name in BUNDLED and not Path(name).is_dir():
        folder = ASSETS / name
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif Path(name).suffix in SINGLE_FILES or Path(name).expanduser().is_file():
        raise ValueError(_single_file(f"model {name!r}", name))
    elif name.count("/") == 1 and name[0] not in "./~":
        folder = _download(name, variant)
    else:
        raise ValueError(f"model {name!r} is no folder; it must be one of {BUNDLED}, a folder, or a hub id owner/name")
    alone = sorted(path.name for path in folder.iterdir() if path.suffix in SINGLE_FILES)
    if alone and not (folder / "model_index.json").exists():
        raise ValueError(_single_file(f"{folder}, which has no model_index.json,", alone[0]))
    index = read_json(folder / "model_index.json")
    class_name = index.get("_class_name")
    require(class_name in PIPELINES, f"{folder}/model_index.json: _class_name", class_name, f"one of {PIPELINES}")
    for key, value in index.items():
        if key in COMPONENTS:
            # Tokenizers differ in class (CLIPTokenizerFast) but not in their files.
            known = key == "tokenizer" or value == list(COMPONENTS[key])
            require(known, f"{folder}/model_index.json: {key}", value, str(list(COMPONENTS[key])))
        elif key == "scheduler":
            named = isinstance(value, list) and value[:1] == ["diffusers"] and isinstance(value[-1], str)
            require(named, f"{folder}/model_index.json: {key}", value, '["diffusers", the name of a scheduler class]')
        elif not key.startswith("_") and key not in UNUSED:
            raise ValueError(f"{folder}/model_index.json: unknown component {key!r}: {value!r}")
    missing = [key for key in (*COMPONENTS, "scheduler") if key not in index]
    require(not missing, f"{folder}/model_index.json: missing components", missing, "none")
    return folder


def _single_file(what: str, file: str) -> str:
    """The message for a checkpoint in one file."""
    return (
        f"{what} is a checkpoint in a single file; it must be a folder in the diffusers layout, which diffusers makes: "
        f"StableDiffusionPipeline.from_single_file({file!r}).save_pretrained(new_folder)"
    )


def _download(hub_id: str, variant: str | None) -> Path:
    """The folder of the files needed: of each network those so marked, or those that serve in their place."""
    folder = _snapshot(hub_id, variant, STEMS)
    missing = _without_weights(folder)
    if missing and (variant is None or len(missing) < len(STEMS)):
        folder = _snapshot(hub_id, None if variant else "fp16", missing)
        missing = _without_weights(folder)
    if missing:
        files = _repository_files(hub_id)
        weights = [file for file in files if Path(file).parent.name in missing and Path(file).suffix in SINGLE_FILES]
        pickles = [file for file in weights if Path(file).suffix in PICKLES]
        alone = [file for file in files if "/" not in file and Path(file).suffix in SINGLE_FILES]
        if alone and "model_index.json" not in files:
            raise ValueError(_single_file(f"model {hub_id!r}", f"https://huggingface.co/{hub_id}/blob/main/{alone[0]}"))
        if pickles and pickles == weights:
            raise checkpoint.pickles_refused(hub_id, pickles, hub_id)
    return folder


def _without_weights(folder: Path) -> dict[str, str]:
    """The networks, with the stems of their files, of which `folder` holds no safetensors file."""
    return {part: stem for part, stem in STEMS.items() if not any((folder / part).glob(f"{stem}*.safetensors"))}


def _repository_files(hub_id: str) -> list[str]:
    """Names of all files of a repository of the hub; none where it does not tell."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(hub_id)
    except Exception:  # as in `_snapshot`; what is missing is then all there is to say
        return []


def _snapshot(hub_id: str, variant: str | None, stems: Mapping[str, str]) -> Path:
    """The folder of the small files of a repository and, of the networks in `stems`, the weights so marked."""
    from huggingface_hub import snapshot_download

    mark = f"*.{variant}*" if variant else "*"
    weights = [f"{part}/{stem}{mark}.safetensors" for part, stem in stems.items()]
    patterns = ["model_index.json", "*/*.json", "tokenizer/*", *weights]
    ignored = [] if variant == "non_ema" else ["*.non_ema*"]
    ignored += [] if variant else ["*.fp16*", "*.bf16*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # the client raises many kinds: no network, no such model, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model {hub_id!r} is no local folder and the hub does not give it: {reason}") from error


def component_config(folder: Path, component: str) -> dict[str, Any]:
    """The config.json of a component."""
    return read_json(folder / component / "config.json")


def scheduler_config(folder: Path) -> SchedulerConfig:
    """The noise schedule, with the two settings that diffusers' own pipeline overrides in every checkpoint.

    As in diffusers, the class is that of model_index.json, whatever class wrote the settings.
    """
    values = read_json(folder / "scheduler" / "scheduler_config.json")
    _, class_name = read_json(folder / "model_index.json")["scheduler"]
    config = SchedulerConfig.from_dict({**values, "_class_name": class_name})
    return dataclasses.replace(config, steps_offset=1, clip_sample=False)


def unet_config(folder: Path, dtype) -> UNetConfig:
    """The U-Net's configuration, with the size that diffusers' own pipeline corrects in old checkpoints.

    Until diffusers 0.9 the file of a 512-pixel model could say 32, the default of then: an integer below 64 means 64.
    """
    values = component_config(folder, "unet")
    size, version = values.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(values.get("_diffusers_version")))
    old = version is not None and tuple(map(int, version.groups())) < (0, 9)
    if old and isinstance(size, int) and size < 64:
        values["sample_size"] = 64
    return UNetConfig.from_dict(values, dtype)


def _builders(configs) -> dict[str, Any]:
    return {
        "text_encoder": lambda: CLIPTextModel(configs.text_encoder, rngs=ShapeRngs()),
        "unet": lambda: UNet2DConditionModel(configs.unet, rngs=ShapeRngs()),
        "vae": lambda: AutoencoderKL(configs.vae, rngs=ShapeRngs()),
    }


def load_networks(folder: Path, configs, param_dtype, variant: str | None) -> tuple[dict, dict]:
    """Graphs and parameters of the three networks, by component name."""
    rename = {"text_encoder": checkpoint.text_name, "vae": checkpoint.vae_name, "unet": lambda name: name}
    marked = [checkpoint.find_weights(folder / name, stem, variant) for name, stem in STEMS.items()]
    if variant and not any(marked):
        wanted = " or ".join(f"{stem}.{variant}.safetensors" for stem in dict.fromkeys(STEMS.values()))
        raise ValueError(f"{folder} holds no {wanted}: it has no variant {variant!r}")
    loaded = {
        name: checkpoint.load_params(
            build,
            checkpoint.weight_files(folder / name, STEMS[name], variant),
            rename=rename[name],
            param_dtype=param_dtype,
        )
        for name, build in _builders(configs).items()
    }
    return {name: pair[0] for name, pair in loaded.items()}, {name: pair[1] for name, pair in loaded.items()}


def save_networks(folder: Path, configs, params: dict, dtype, variant: str | None) -> None:
    """Write config.json and weights of the three networks, and make the folders of the rest."""
    mark = f".{variant}" if variant else ""
    for name, stem in STEMS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / "config.json", getattr(configs, name).to_dict())
        path = folder / name / f"{stem}{mark}.safetensors"
        prefix = "text_model." if name == "text_encoder" else ""
        checkpoint.save_params(params[name], path, dtype=np.dtype(dtype), prefix=prefix)
    (folder / "scheduler").mkdir(exist_ok=True)


def model_index(scheduler: SchedulerConfig) -> dict[str, Any]:
    """The model_index.json of a pipeline without safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        **{name: list(pair) for name, pair in COMPONENTS.items()},
        "scheduler": ["diffusers", scheduler.class_name],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "image_encoder": [None, None],
    }
