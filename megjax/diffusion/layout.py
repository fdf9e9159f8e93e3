"""The diffusers folder layout: finding a model, reading and writing its components."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megjax.configs import read_json, require, write_json
from megjax.diffusion import checkpoint
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.schedules import CLASS_NAMES, SchedulerConfig
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.diffusion.vae import AutoencoderKL

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = ("scenes",)
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

    Raises ValueError if there is none, or if its model_index.json describes another kind of pipeline.
    """
    name = str(path_or_hub_id)
    if name in BUNDLED and not Path(name).is_dir():
        folder = ASSETS / name
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.count("/") == 1 and name[0] not in "./~":
        folder = _download(name, variant)
    else:
        raise ValueError(f"model {name!r} is no folder; it must be one of {BUNDLED}, a folder, or a hub id owner/name")
    index = read_json(folder / "model_index.json")
    for key, value in index.items():
        if key in COMPONENTS:
            # Tokenizers differ in class (CLIPTokenizerFast) but not in their files.
            known = key == "tokenizer" or value == list(COMPONENTS[key])
            require(known, f"{folder}/model_index.json: {key}", value, str(list(COMPONENTS[key])))
        elif key == "scheduler":
            classes = [["diffusers", name] for name in CLASS_NAMES.values()]
            require(value in classes, f"{folder}/model_index.json: {key}", value, f"one of {classes}")
        elif not key.startswith("_") and key not in UNUSED:
            raise ValueError(f"{folder}/model_index.json: unknown component {key!r}: {value!r}")
    missing = [key for key in (*COMPONENTS, "scheduler") if key not in index]
    require(not missing, f"{folder}/model_index.json: missing components", missing, "none")
    return folder


def _download(hub_id: str, variant: str | None) -> Path:
    folder = _snapshot(hub_id, variant)
    if variant is None and any(not any((folder / part).glob(f"{stem}*.safetensors")) for part, stem in STEMS.items()):
        folder = _snapshot(hub_id, "fp16")
    return folder


def _snapshot(hub_id: str, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    mark = f"*.{variant}*" if variant else "*"
    weights = [f"{part}/{stem}{mark}.safetensors" for part, stem in STEMS.items()]
    patterns = ["model_index.json", "*/*.json", "tokenizer/*", *weights]
    ignored = ["*.non_ema*"] + ([] if variant else ["*.fp16*", "*.bf16*"])
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


def _builders(configs) -> dict[str, Any]:
    return {
        "text_encoder": lambda: CLIPTextModel(configs.text_encoder, rngs=ShapeRngs()),
        "unet": lambda: UNet2DConditionModel(configs.unet, rngs=ShapeRngs()),
        "vae": lambda: AutoencoderKL(configs.vae, rngs=ShapeRngs()),
    }


def load_networks(folder: Path, configs, param_dtype, variant: str | None) -> tuple[dict, dict]:
    """Graphs and parameters of the three networks, by component name."""
    rename = {"text_encoder": checkpoint.text_name, "vae": checkpoint.vae_name, "unet": lambda name: name}
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
        "scheduler": ["diffusers", CLASS_NAMES[scheduler.sampler]],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "image_encoder": [None, None],
    }
