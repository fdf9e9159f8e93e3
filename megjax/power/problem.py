"""The power-control problem of one image: what is to be minimised, under which budget."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from megjax.configs import require, require_count
from megjax.units import check_snr_db, db_to_linear


class Problem(NamedTuple):
    """Power control over T fading blocks: minimise sum_t w_t / (1 + p_t g_t snr) with sum_t p_t <= energy.

    `snr` is the linear 1 / sigma^2, `weights` [t] are the importance w_t of the blocks, `energy` is T times the mean
    power, `max_power` the peak of every p_t.
    """

    snr: Float[Array, ""]
    weights: Float[Array, " t"]
    energy: Float[Array, ""]
    max_power: Float[Array, ""]

    @property
    def num_blocks(self) -> int:
        """T."""
        return self.weights.shape[-1]


def power_problem(
    snr_db: ArrayLike,
    num_blocks: int = 16,
    weights: Float[ArrayLike, " t"] | None = None,
    mean_power: ArrayLike = 1.0,
    max_power: ArrayLike = math.inf,
) -> Problem:
    """A problem at this 1 / sigma^2 in dB; `weights` [t] are all 1 unless given.

    Raises ValueError for fewer than one block, a mean or peak power that is not positive, weights of another length,
    negative or not finite, or all zero, or a bad SNR. Under jit, vmap or grad traced values are checked for their shape
    only.
    """
    check_num_blocks(num_blocks)
    weights = np.ones(num_blocks) if weights is None else check_weights(weights, num_blocks)
    if not isinstance(snr_db, jax.core.Tracer):
        check_snr_db(snr_db)
    require(jnp.ndim(snr_db) == 0, "snr_db", snr_db, "one number in dB")
    check_powers(mean_power, max_power)
    energy = jnp.asarray(num_blocks * mean_power, jnp.float32)
    peak = jnp.asarray(max_power, jnp.float32)
    return Problem(db_to_linear(snr_db), jnp.asarray(weights, jnp.float32), energy, peak)


def check_num_blocks(num_blocks: int) -> None:
    """ValueError unless T is an integer of at least 1."""
    require_count("num_blocks", num_blocks)


def check_powers(mean_power: ArrayLike, max_power: ArrayLike) -> None:
    """ValueError unless the mean power is positive and finite and the peak positive (infinite for none)."""
    if not isinstance(mean_power, jax.core.Tracer):
        require(0 < mean_power < math.inf, "mean_power", mean_power, "positive and finite")
    if not isinstance(max_power, jax.core.Tracer):
        require(max_power > 0, "max_power", max_power, "positive")


def check_weights(weights: ArrayLike, num_blocks: int) -> np.ndarray | Array:
    """Weights [... t] as float64, traced ones as they are.

    ValueError unless they fit the blocks and, outside jit, are finite, 0 or more, and not all 0.
    """
    shape = jnp.shape(weights)
    require(len(shape) > 0 and shape[-1] == num_blocks, "weights' shape", shape, f"[..., {num_blocks}]")
    if isinstance(weights, jax.core.Tracer):
        return weights
    values = np.asarray(weights, np.float64)
    valid = bool(np.all(np.isfinite(values)) and np.all(values >= 0) and np.all(values.max(-1) > 0))
    require(valid, "weights", weights, "finite, 0 or more, and not all 0")
    return values


def weighted_errors(problem: Problem, gains: Float[Array, " t"], power: Float[Array, " t"]) -> Float[Array, " t"]:
    """w_t / (1 + gamma_t) of every block [t], gamma_t = p_t g_t / sigma^2: the error that power control minimises."""
    return problem.weights / (1 + power * gains * problem.snr)


def pay(
    energy: Float[Array, ""], wanted: Float[Array, ""], max_power: Float[ArrayLike, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Energy left after a block, and its power: what is wanted, at most the energy there is, up to the peak."""
    power = jnp.minimum(wanted, max_power)
    return jnp.maximum(energy - power, 0.0), power


def check_gains(gains: Float[ArrayLike, "*s t"], problem: Problem | None = None) -> None:
    """ValueError unless there is a gain for each weight of `problem` and, outside jit, all are finite and 0 or more."""
    if problem is not None:
        shape, needed = jnp.shape(gains), jnp.shape(problem.weights)
        require(shape == needed, "gains' shape", shape, f"{needed}, one for each of the problem's weights")
    if isinstance(gains, jax.core.Tracer):
        return
    values = np.asarray(gains)
    valid = not np.iscomplexobj(values) and bool(np.all(np.isfinite(values)) and np.all(values >= 0))
    require(valid, "gains", gains, "power gains |h_t|^2, finite and 0 or more")
