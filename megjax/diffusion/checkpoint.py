"""Diffusers-layout weights to and from NNX parameters, strictly: a walk over the tree plus kernel transposes."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from megjax.configs import read_json, require
from megjax.files import FLOAT8, misfits, read_safetensors, write_safetensors

UNET_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
STORED = ("float32", "bfloat16", "float16", *(jnp.dtype(kind).name for kind in FLOAT8.values()))
"""Types in which weights are stored."""
LEAF_NAMES = {
    **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
    **{"bias": "bias", "mean": "running_mean", "var": "running_var"},
}
# Attention names of VAE checkpoints written before diffusers 0.17.
LEGACY_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def vae_name(name: str) -> str:
    """The present name of a VAE tensor."""
    if ".attentions." in name:
        for old, new in LEGACY_ATTENTION.items():
            name = name.replace(old, new)
    return name


def text_name(name: str) -> str | None:
    """The name of a text-encoder tensor in this port; None for the table of positions, which is not a parameter."""
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name


def find_weights(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of one model, single or sharded, so marked (None: not marked); none where it has none.

    Raises ValueError if a shard is missing.
    """
    dotted = f".{variant}" if variant else ""
    single = folder / f"{stem}{dotted}.safetensors"
    if single.is_file():
        return [single]
    for index in (folder / f"{stem}.safetensors.index{dotted}.json", folder / f"{stem}{dotted}.safetensors.index.json"):
        if index.is_file():
            mapped = read_json(index).get("weight_map")
            names = sorted(set(map(str, mapped.values()))) if isinstance(mapped, dict) else []
            absent = [name for name in names if not (folder / name).is_file()]
            require(bool(names) and not absent, f"{index}: shards", absent or names, "files beside the index")
            return [folder / name for name in names]
    return []


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one model: of `variant` where there are, else plain ones (None: plain, else fp16).

    Raises ValueError if there are none, if a shard is missing, or if there are only pickles.
    """
    require(folder.is_dir(), "model folder", str(folder), "an existing folder")
    for tag in (variant, None) if variant else (None, "fp16"):
        if files := find_weights(folder, stem, tag):
            return files
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise pickles_refused(str(folder), pickles, str(folder.parent))
    marked = f"{stem}.{variant}.safetensors or " if variant else ""
    raise ValueError(f"{folder} holds no {marked}{stem}.safetensors, nor an index of its shards")


def pickles_refused(where: str, names: list[str], model: str) -> ValueError:
    """The error for a folder or repository of `model`, whose weights `names` are all pickled."""
    return ValueError(
        f"{where} holds only pickled weights ({', '.join(names)}), which are refused because loading "
        "one can run any code; convert them where you trust them, with diffusers: "
        f"StableDiffusionPipeline.from_pretrained({model!r}).save_pretrained(new_folder, safe_serialization=True)"
    )


def _torch_name(path: tuple) -> str:
    return ".".join([*map(str, path[:-1]), LEAF_NAMES[path[-1]]])


def _to_jax(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value


def _to_torch(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value


def _torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
    return shape


def load_params(
    make_model: Callable[[], nnx.Module],
    files: list[Path],
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    param_dtype=jnp.float32,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameters of the model that `make_model` builds, its weights read from `files`.

    The model is only traced, so no random weights are drawn. Raises ValueError listing every missing, extra and
    mis-shaped tensor at once, or naming a damaged file.
    """
    model = nnx.eval_shape(make_model)
    graph, abstract = nnx.split(model)
    wanted = {_torch_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(abstract)}
    found, stored, shapes = {}, {}, {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            if (renamed := rename(name)) is None:
                continue
            if renamed in wanted:
                path, leaf = wanted[renamed]
                expected = _torch_shape(path, leaf.shape)
                # The oldest VAE checkpoints hold attention as 1x1 convolutions.
                attention = ".attentions.0." in renamed and rename is vae_name and len(expected) == 2
                tensor = tensor[:, :, 0, 0] if attention and tensor.shape == (*expected, 1, 1) else tensor
                stored[renamed], shapes[name] = name, jax.ShapeDtypeStruct(expected, param_dtype)
            found[name] = tensor
    shapes |= {name: wanted[name][1] for name in wanted.keys() - stored.keys()}
    if problems := misfits(found, shapes):
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where} does not fit the configuration of {type(model).__name__}: {'; '.join(problems)}")
    flat = [
        (path, leaf.replace(jnp.asarray(_to_jax(path, found.pop(stored[name])), param_dtype)))
        for name, (path, leaf) in wanted.items()
    ]
    return graph, nnx.from_flat_state(flat)


def check_storable(params: nnx.State, dtype, source: str) -> None:
    """ValueError naming the first parameter of `source` that is too large for the type `dtype`."""
    limit = float(jnp.finfo(dtype).max)
    for path, value in nnx.to_flat_state(params):
        magnitudes = np.abs(np.asarray(value[...]).astype(np.float32))
        largest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
        allowed = f"at most {limit:g} to be stored as {jnp.dtype(dtype).name}"
        require(largest <= limit, f"{source}: magnitude of {_torch_name(path)}", largest, allowed)


def save_params(params: nnx.State, path: Path, *, dtype=np.float32, prefix: str = "") -> None:
    """Write `params` to the safetensors file `path` under their PyTorch names and shapes."""
    tensors = {
        prefix + _torch_name(key): np.ascontiguousarray(_to_torch(key, np.asarray(value[...])).astype(dtype))
        for key, value in nnx.to_flat_state(params)
    }
    write_safetensors(path, tensors, {"format": "pt"})
