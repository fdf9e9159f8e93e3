"""Streaming reductions for rollouts: a part computed on the device for each chunk, merged on the host in float64."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from megjax.configs import require_count

_GROUP = 256
"""Values summed one after the other in float32; longer sums are sums of groups, which keeps rounding small."""


@runtime_checkable
class Reduction(Protocol):
    """How a rollout condenses what `fn` returns; hashable, so that compiled programs can be kept."""

    def partial(self, values: Any, valid: Bool[Array, " n"]) -> Any:
        """Traced: condense a batch, leaves [n ...], of which only the entries marked `valid` count."""

    def merge(self, total: Any, part: Any) -> Any:
        """On the host: `total` and the `part` that follows it in order, same tree of NumPy arrays, as one such tree."""

    def finish(self, total: Any) -> Any:
        """On the host: what the rollout returns."""


class Statistics(NamedTuple):
    """Sample moments of every leaf of what `fn` returned, float64 (complex128 means for complex leaves)."""

    count: int
    mean: Any
    variance: Any
    """Unbiased; of a complex leaf E|z - mean|^2."""

    @property
    def standard_error(self) -> Any:
        """Standard error of `mean`, leaf by leaf: sqrt(variance / count)."""
        return jax.tree.map(lambda variance: np.sqrt(variance / self.count), self.variance)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of every leaf, by the pairwise update of Chan, Golub and LeVeque, Am. Stat. 37, 1983.

    Boolean and integer leaves count as numbers, so the mean of an event is its relative frequency.
    """

    def partial(self, values: Any, valid: Bool[Array, " n"]) -> dict[str, Any]:
        """Count, mean and sum of squared deviations of a batch."""
        count = jnp.sum(valid)
        pairs = jax.tree.map(lambda leaf: _centred_moments(leaf, valid), values)
        mean, scatter = jax.tree.transpose(jax.tree.structure(values), jax.tree.structure((0, 0)), pairs)
        return {"count": count, "mean": mean, "scatter": scatter}

    def merge(self, total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
        """Moments of both, in float64."""
        n, m = int(total["count"]), int(part["count"])
        if n == 0 or m == 0:
            return total if m == 0 else part
        share = m / (n + m)

        def mean(a, b):
            return _double(a) + (_double(b) - _double(a)) * share

        def scatter(a, b, mean_a, mean_b):
            return _double(a) + _double(b) + np.abs(_double(mean_b) - _double(mean_a)) ** 2 * (n * share)

        return {
            "count": np.asarray(n + m),
            "mean": jax.tree.map(mean, total["mean"], part["mean"]),
            "scatter": jax.tree.map(scatter, total["scatter"], part["scatter"], total["mean"], part["mean"]),
        }

    def finish(self, total: dict[str, Any]) -> Statistics:
        """`Statistics`; the variance of a single realisation is NaN."""
        count = int(total["count"])
        spread = count - 1 if count > 1 else np.nan
        variance = jax.tree.map(lambda scatter: _double(scatter) / spread, total["scatter"])
        return Statistics(count, jax.tree.map(_double, total["mean"]), variance)


class Counts(NamedTuple):
    """A histogram of every leaf, over all realisations and all entries of the leaf."""

    edges: np.ndarray
    """Bin edges [bins + 1]."""
    counts: Any
    """int64 [bins + 2] for each leaf: below the first edge, the bins, at or above the last edge (NaN counts there)."""

    def cdf(self) -> Any:
        """Share of entries below each edge [bins + 1], leaf by leaf."""
        return jax.tree.map(lambda counts: np.cumsum(counts)[:-1] / counts.sum(), self.counts)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Histogram of every real leaf with `bins` equal bins from `low` to `high`, and what falls outside."""

    low: float
    high: float
    bins: int = 100

    def __post_init__(self):
        require_count("bins", self.bins)
        if not -np.inf < self.low < self.high < np.inf:
            raise ValueError(f"low, high are {self.low!r}, {self.high!r}; they must be finite and increasing")

    @property
    def edges(self) -> np.ndarray:
        """Bin edges [bins + 1]."""
        return np.linspace(self.low, self.high, self.bins + 1)

    def partial(self, values: Any, valid: Bool[Array, " n"]) -> Any:
        """Counts int32 [bins + 2] of a batch."""

        def count(leaf):
            if jnp.iscomplexobj(leaf):
                raise ValueError("a complex leaf has no histogram; return its magnitude or its parts")
            scaled = (leaf.reshape(-1).astype(jnp.float32) - self.low) * (self.bins / (self.high - self.low))
            inside = jnp.clip(jnp.floor(scaled), -1, self.bins).astype(jnp.int32) + 1
            position = jnp.where(jnp.isnan(scaled), self.bins + 1, inside)
            repeats = leaf.size // leaf.shape[0]
            return jnp.zeros(self.bins + 2, jnp.int32).at[position].add(jnp.repeat(valid, repeats).astype(jnp.int32))

        return jax.tree.map(count, values)

    def merge(self, total: Any, part: Any) -> Any:
        """Sum of the counts, int64."""
        return jax.tree.map(lambda a, b: np.asarray(a, np.int64) + b, total, part)

    def finish(self, total: Any) -> Counts:
        """`Counts` with the edges."""
        return Counts(self.edges, jax.tree.map(lambda counts: np.asarray(counts, np.int64), total))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Everything that `fn` returned, leaves [num ...] in order, on the host: memory grows with `num`."""

    def partial(self, values: Any, valid: Bool[Array, " n"]) -> dict[str, Any]:
        """The batch itself."""
        return {"values": values, "valid": valid}

    def merge(self, total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
        """One after the other."""
        return jax.tree.map(lambda a, b: np.concatenate([a, b]), total, part)

    def finish(self, total: dict[str, Any]) -> Any:
        """The valid entries."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(total["valid"])], total["values"])


def _double(value) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def _centred_moments(leaf: Array, valid: Bool[Array, " n"]) -> tuple[Array, Array]:
    """Mean and sum of |x - mean|^2 over the valid entries of [n ...], each [...]; zeros when there are none."""
    leaf = leaf.astype(jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32)
    used = valid.reshape(-1, *(1,) * (leaf.ndim - 1))
    count = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
    mean = _grouped_sum(jnp.where(used, leaf, 0)) / count.astype(leaf.dtype)
    deviation = jnp.where(used, leaf - mean[None], 0)
    # |x - mean|^2 of what rounding left of the mean is taken off, so that a rough mean does no harm.
    rest = _grouped_sum(deviation)
    squares = jnp.square(deviation.real) + jnp.square(deviation.imag)
    scatter = _grouped_sum(squares) - (jnp.square(rest.real) + jnp.square(rest.imag)) / count
    return mean + rest / count.astype(leaf.dtype), scatter


def _grouped_sum(leaf: Array) -> Array:
    """Sum over the first axis in groups."""
    padded = jnp.pad(leaf, ((0, -leaf.shape[0] % _GROUP), *((0, 0),) * (leaf.ndim - 1)))
    return jnp.sum(jnp.sum(padded.reshape(-1, _GROUP, *leaf.shape[1:]), axis=1), axis=0)
