"""SceneNet: a small classifier of a rendered scene's attributes, whose hidden layer also serves as image features."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from megjax.configs import from_mapping, read_json, require_positive_integers, write_json
from megjax.diffusion import checkpoint
from megjax.diffusion.layers import ShapeRngs
from megjax.metrics.base import METRICS, Metric, Received, References, mean_over_images
from megjax.precision import promoting

NUM_SCENE_ATTRIBUTES = 3  # time, sky, ground; then (kind, colour, size) of each place, kind 0 meaning "nothing here"
ATTRIBUTES_PER_SLOT = 3
WEIGHTS_NAME = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class SceneNetConfig:
    """Shape of a SceneNet.

    `num_classes` lists the classes of every attribute: time, sky, ground, then kind (with "none" as class 0), colour
    and size of the left, centre and right places. `image_size` is the side in pixels and must be a multiple of 16.
    """

    image_size: int = 64
    widths: tuple[int, int, int, int] = (24, 48, 96, 128)
    num_classes: tuple[int, ...] = (4, 3, 4, 7, 7, 2, 7, 7, 2, 7, 7, 2)
    feature_dim: int = 128
    num_groups: int = 8

    def __post_init__(self):
        names = ("image_size", "widths", "num_classes", "feature_dim", "num_groups")
        require_positive_integers(self, "scenenet", names)
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size is {self.image_size}; it must be a positive multiple of 16")
        if len(self.widths) != 4 or any(width < 1 or width % self.num_groups for width in self.widths):
            raise ValueError(f"widths is {self.widths}; it must be four multiples of num_groups={self.num_groups}")
        slots = len(self.num_classes) - NUM_SCENE_ATTRIBUTES
        if slots < 0 or slots % ATTRIBUTES_PER_SLOT or min(self.num_classes) < 2:
            raise ValueError(
                f"num_classes is {self.num_classes}; it must be {NUM_SCENE_ATTRIBUTES} scene attributes followed by "
                f"{ATTRIBUTES_PER_SLOT} per place, each with two classes or more"
            )


class ConvBlock(nnx.Module):
    """Convolution, group normalisation, SiLU; adds its input to its output when `residual`."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int, residual: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (size, size), strides=stride, padding="SAME", rngs=rngs)
        self.norm = nnx.GroupNorm(outputs, num_groups=groups, rngs=rngs)
        self.residual = residual

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = nnx.silu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class SceneNet(nnx.Module):
    """Classifier of the twelve attributes of a scene; images in [0, 1], channels last.

    Three stride-2 convolutions reach 1/8 of the image, a residual and a widening one work there, and the map is
    averaged to 1/16 and flattened, so that the dense layer still sees where an object stands.
    """

    def __init__(self, config: SceneNetConfig, rngs: nnx.Rngs):
        w, groups = config.widths, config.num_groups
        self.config = config
        self.blocks = nnx.List(
            [
                ConvBlock(3, w[0], 5, 2, groups, False, rngs),
                ConvBlock(w[0], w[1], 3, 2, groups, False, rngs),
                ConvBlock(w[1], w[2], 3, 2, groups, False, rngs),
                ConvBlock(w[2], w[2], 3, 1, groups, True, rngs),
                ConvBlock(w[2], w[3], 3, 1, groups, False, rngs),
            ]
        )
        self.dense = nnx.Linear((config.image_size // 16) ** 2 * w[3], config.feature_dim, rngs=rngs)
        self.head = nnx.Linear(config.feature_dim, sum(config.num_classes), rngs=rngs)

    def features(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b f"]:
        """Features for Frechet distances: the last hidden layer before its activation."""
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images has shape {images.shape}; this SceneNet takes [b {size} {size} 3]")
        x = 2 * images - 1
        for block in self.blocks:
            x = block(x)
        x = promoting(nnx.avg_pool)(x, (2, 2), strides=(2, 2))  # flax divides by an integer
        return self.dense(x.reshape(x.shape[0], -1))

    def __call__(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b f"], tuple[Float[Array, "b n"], ...]]:
        """Features [b f] and one array of logits [b classes] per attribute."""
        features = self.features(images)
        ends = np.cumsum(self.config.num_classes)[:-1].tolist()
        return features, tuple(jnp.split(self.head(nnx.silu(features)), ends, axis=-1))

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Writes config.json and model.safetensors to `folder`, weights stored as `dtype` ("float16" or "float32")."""
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype is {dtype!r}; it must be "float16" or "float32"')
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_params(nnx.state(self, nnx.Param), folder / WEIGHTS_NAME, dtype=np.dtype(dtype))
        write_json(folder / "config.json", dataclasses.asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path) -> "SceneNet":
        """Reads what `save` wrote; parameters are float32. Raises ValueError listing every mismatch at once."""
        folder = Path(folder)
        config = from_mapping(SceneNetConfig, read_json(folder / "config.json"), source="scenenet config")
        return nnx.merge(*checkpoint.load_params(lambda: cls(config, ShapeRngs()), [folder / WEIGHTS_NAME]))


def slot_mask(labels: Int[Array, "b a"]) -> Bool[Array, "b a"]:
    """Which attributes exist: all but the colour and size of a place whose kind is 0 (nothing there)."""
    scene = jnp.ones((labels.shape[0], NUM_SCENE_ATTRIBUTES), bool)
    occupied = labels[:, NUM_SCENE_ATTRIBUTES::ATTRIBUTES_PER_SLOT] > 0
    slots = jnp.stack([jnp.ones_like(occupied), occupied, occupied], axis=-1)
    return jnp.concatenate([scene, slots.reshape(labels.shape[0], -1)], axis=-1)


def loss(
    logits: tuple[Float[Array, "b _"], ...], labels: Int[Array, "b a"], mask: Bool[Array, "b a"]
) -> Float[Array, ""]:
    """Mean cross-entropy in nats over the attributes that `mask` (see `slot_mask`) keeps, each weighing the same."""
    labels = jnp.where(mask, labels, 0)
    losses = [
        -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, i, None], axis=-1)[:, 0]
        for i, scores in enumerate(logits)
    ]
    counted = mask.astype(jnp.float32)
    return jnp.sum(jnp.stack(losses, axis=-1) * counted) / jnp.maximum(jnp.sum(counted), 1)


def labels_from_logits(logits: tuple[Float[Array, "b _"], ...]) -> Int[Array, "b a"]:
    """Most likely class of every attribute; colour and size are -1 (never right) where the place is seen as empty."""
    labels = jnp.stack([jnp.argmax(scores, axis=-1) for scores in logits], axis=-1).astype(jnp.int32)
    return jnp.where(slot_mask(labels), labels, -1)


def predict(model: SceneNet, images: Float[Array, "b h w 3"]) -> Int[Array, "b a"]:
    """Attributes of `images` as `labels_from_logits` gives them, int32."""
    return labels_from_logits(model(images)[1])


def attribute_accuracy(
    predicted: Int[Array, "b a"], labels: Int[Array, "b a"], mask: Bool[Array, "b a"]
) -> Float[Array, " a"]:
    """Fraction of right answers for each attribute over the images where `mask` keeps it (nan where it keeps none)."""
    return jnp.sum((predicted == labels) & mask, axis=0) / jnp.sum(mask, axis=0)


def caption_accuracy(
    predicted: Int[Array, "b a"], labels: Int[Array, "b a"], mentioned: Bool[Array, "b a"]
) -> tuple[Float[Array, " b"], Int[Array, ""], Int[Array, ""]]:
    """Agreement of images with their captions.

    Returns the fraction of mentioned attributes that are right in each image [b] (nan where the caption mentions none),
    the total number right and the total number mentioned; right / mentioned is the caption accuracy of the set.
    """
    right = (predicted == labels) & mentioned
    return jnp.sum(right, axis=1) / jnp.sum(mentioned, axis=1), jnp.sum(right), jnp.sum(mentioned)


def _caption_shares(received: Received) -> Float[Array, "b r"]:
    """Share of stated attributes that every reception shows."""
    labels, stated = (jnp.repeat(x, received.size[1], axis=0) for x in received.captions)
    share, _, _ = caption_accuracy(labels_from_logits(received.output("scenenet")[1]), labels, stated)
    return share.reshape(received.size)


def _mean_over_statements(name: str, values: Float[np.ndarray, "n r"], references: References) -> dict[str, Any]:
    return mean_over_images(name, values, references, weights=references.stated.sum(1).astype(float))


METRICS.register(
    Metric(
        name="caption_accuracy",
        title="caption accuracy",
        version=1,
        rank=40,
        compute=_caption_shares,
        needs=("images", "scenenet", "captions"),
        reduce=_mean_over_statements,
    )
)
