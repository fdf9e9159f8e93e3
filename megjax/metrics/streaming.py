"""Metrics that accumulate batch by batch on the device, in the protocol of `clu.metrics`."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Float

from megjax.configs import require_count
from megjax.metrics.image import psnr, ssim
from megjax.precision import exact_matmul


@flax.struct.dataclass
class Average(metrics.Average):
    """`metrics.Average`, whose sum and count are of different types."""

    def compute(self) -> Float[Array, ""]:
        """The mean; nan of nothing."""
        return self.total / jnp.asarray(self.count, self.total.dtype)


@flax.struct.dataclass
class GaussianMoments(metrics.Metric):
    """Count, mean and scatter of features, from which `frechet_distance` takes its Gaussian.

    `mean` is [f] and `scatter` [f f], the sum of outer products of deviations from the mean. Batches are centred before
    they are squared, and merged by the formula of T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", COMPSTAT 1982: float32 then suffices far from a zero mean too.
    Still, float32 leaves eigenvalues of the covariance below about 1e-7 of the largest undetermined: with fewer samples
    than features, use `feature_statistics`, which works in float64. `GaussianMoments.sized(f)` has an `empty()`.
    """

    count: Any  # int32 [], mean float32 [f], scatter float32 [f f]; Any, as JAX also puts shapes and axes here
    mean: Any
    scatter: Any

    @classmethod
    def sized(cls, num_features: int) -> type["GaussianMoments"]:
        """A subclass for features [n num_features], which knows its size before it sees any."""
        return _sized(cls, require_count("num_features", num_features))

    @classmethod
    def empty(cls) -> "GaussianMoments":
        """No samples; only for a class made by `sized`."""
        raise ValueError("GaussianMoments.empty() does not know its size; use GaussianMoments.sized(f).empty()")

    @classmethod
    def from_model_output(
        cls, features: Array | np.ndarray, mask: Array | np.ndarray | None = None, **_: Any
    ) -> "GaussianMoments":
        """Moments of features [n f]; `mask` [n] drops the rows where it is false, whatever they hold.

        Other model outputs are ignored, as clu's collections hand all of them to every metric. Raises ValueError for
        other shapes.
        """
        if features.ndim != 2:
            raise ValueError(f"features has shape {features.shape}; it must be [n f]")
        _check_mask(mask, features.shape[0])
        kept = jnp.ones(features.shape[0], bool) if mask is None else jnp.asarray(mask, bool)
        x = jnp.where(kept[:, None], jnp.asarray(features, jnp.float32), 0.0)
        count = jnp.sum(kept, dtype=jnp.int32)
        mean = jnp.sum(x, axis=0) / jnp.maximum(count, 1).astype(jnp.float32)
        centred = jnp.where(kept[:, None], x - mean[None], 0.0)
        return cls(count=count, mean=mean, scatter=_outer_products(centred))

    def merge(self, other: "GaussianMoments") -> "GaussianMoments":
        """Moments of both sets of samples together; ValueError if their features differ in number."""
        if jnp.shape(self.mean) != jnp.shape(other.mean):
            raise ValueError(f"moments have means of shapes {self.mean.shape} and {other.mean.shape}; they must agree")
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)  # of the second set
        shift, first = other.mean - self.mean, jnp.asarray(self.count, jnp.float32)
        return type(self)(
            count=count,
            mean=self.mean + share * shift,
            scatter=self.scatter + other.scatter + first * share * jnp.outer(shift, shift),
        )

    def compute(self) -> tuple[Float[Array, " f"], Float[Array, "f f"]]:
        """Mean [f] and unbiased covariance [f f], as `feature_statistics` gives them; nan below two samples."""
        divisor = jnp.where(self.count > 1, jnp.asarray(self.count - 1, jnp.float32), jnp.nan)
        return jnp.where(self.count > 0, self.mean, jnp.nan), self.scatter / divisor


@functools.cache
def make_image_metrics(*, captions: bool = False, num_features: int | None = None) -> type[metrics.Collection]:
    """A `clu.metrics.Collection` of image quality; the same options give the same class.

    `single_from_model_output` takes, by name, `reference` and `images` [b h w c] in [0, 1] and optionally `mask` [b],
    false where a batch is only padded. `compute()` gives, over all pairs,

    - `psnr_db`: mean of the pairs' PSNR in dB, infinite if two images are identical, and `ssim`: mean of their SSIM;
    - with `captions`: `caption_accuracy`, the share of right attributes among those mentioned, from `predicted`,
      `labels` and `mentioned` [b a] as in `scenenet.caption_accuracy`;
    - with `num_features`: `moments`, mean and covariance of `features` [b num_features].

    Averages over nothing are nan. Raises ValueError, when called or traced, for outputs absent or of other shapes.
    """
    parts = {
        "psnr_db": Average.from_fun(functools.partial(_over_pairs, psnr)),
        "ssim": Average.from_fun(functools.partial(_over_pairs, ssim)),
    }
    if captions:
        parts["caption_accuracy"] = Average.from_fun(_right_answers)
    if num_features is not None:
        parts["moments"] = GaussianMoments.sized(num_features).from_fun(_features)
    return metrics.Collection.create(**parts)


@functools.cache
def _sized(cls: type[GaussianMoments], num_features: int) -> type[GaussianMoments]:
    @flax.struct.dataclass
    class SizedMoments(cls):
        """Moments of a known number of features."""

        @classmethod
        def empty(cls) -> GaussianMoments:
            return cls(
                count=jnp.zeros((), jnp.int32),
                mean=jnp.zeros(num_features, jnp.float32),
                scatter=jnp.zeros((num_features, num_features), jnp.float32),
            )

        @classmethod
        def from_model_output(
            cls, features: Array | np.ndarray, mask: Array | np.ndarray | None = None, **_: Any
        ) -> GaussianMoments:
            if features.shape[1:] != (num_features,):
                raise ValueError(f"features has shape {features.shape}; it must be [n {num_features}]")
            return super().from_model_output(features, mask)

    return SizedMoments


def _outer_products(centred: Float[Array, "n f"]) -> Float[Array, "f f"]:
    """Sum over samples."""
    return exact_matmul(centred.T, centred)


def _check_mask(mask: Array | np.ndarray | None, num: int) -> None:
    if mask is not None and mask.shape != (num,):
        raise ValueError(f"mask has shape {mask.shape}; it must be ({num},), one entry per image")


def _outputs(outputs: dict[str, Any], *names: str) -> list[Any]:
    """The model outputs `names`, all of one shape, after a check of the mask."""
    absent = [name for name in names if name not in outputs]
    if absent:
        raise ValueError(f"model outputs lack {', '.join(absent)}; these metrics need {', '.join(names)}")
    values = [outputs[name] for name in names]
    if len({value.shape for value in values}) > 1:
        raise ValueError(f"{', '.join(names)} have shapes {[value.shape for value in values]}; they must agree")
    _check_mask(outputs.get("mask"), values[0].shape[0])
    return values


def _over_pairs(metric: Any, **outputs: Any) -> Float[Array, " b"]:
    reference, images = _outputs(outputs, "reference", "images")
    if images.ndim != 4:
        raise ValueError(f"images has shape {images.shape}; it must be [b h w c]")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (reference, images)):
        raise ValueError(
            f"reference and images have dtypes {reference.dtype} and {images.dtype}; they must be floating, in [0, 1]"
        )
    return jax.vmap(metric)(jnp.asarray(reference), jnp.asarray(images))


def _right_answers(**outputs: Any) -> dict[str, Array]:
    predicted, labels, mentioned = _outputs(outputs, "predicted", "labels", "mentioned")
    counted = jnp.asarray(mentioned, bool)
    if outputs.get("mask") is not None:
        counted &= jnp.asarray(outputs["mask"], bool)[:, None]
    return {"values": (jnp.asarray(predicted) == jnp.asarray(labels)).astype(jnp.float32), "mask": counted}


def _features(**outputs: Any) -> Array | np.ndarray:
    return _outputs(outputs, "features")[0]
