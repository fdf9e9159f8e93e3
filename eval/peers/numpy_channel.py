"""Channel rollouts in NumPy, as a careful user writes them: threads, float32, cache-sized pieces, reused output."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PIECE = 128
"""Realisations worked on at a time, so that temporaries stay in the cache."""
NAME = "NumPy, a thread a core"


def block_fading(symbols: np.ndarray, noise_var: float) -> Callable[[], np.ndarray]:
    """A call that sends `symbols` [b t k] over fresh Rayleigh block fading with noise, into the same output array."""
    received = np.empty_like(symbols)

    def piece(rng: np.random.Generator, rows: slice) -> None:
        shape = symbols[rows].shape
        gains = _complex_normal(rng, (*shape[:2], 1))
        noise = _complex_normal(rng, shape, noise_var)
        noise += gains * symbols[rows]
        received[rows] = noise

    return _threaded(piece, len(symbols), received)


def jakes(batch: int, num_blocks: int, doppler: float, num_paths: int) -> Callable[[], np.ndarray]:
    """A call that draws Clarke/Jakes gains [b t]: the same stratified spectral sum as `megjax.channel.JakesFading`."""
    gains = np.empty((batch, num_blocks), np.complex64)
    times = np.arange(num_blocks, dtype=np.float32)

    def piece(rng: np.random.Generator, rows: slice) -> None:
        gains[rows] = _spectral_sum(rng, (gains[rows].shape[0],), times * np.float32(doppler), num_paths)

    return _threaded(piece, batch, gains)


def tdl(batch: int, num_steps: int, doppler: float, powers: np.ndarray, num_paths: int) -> Callable[[], np.ndarray]:
    """A call that draws taps [b t l] with these `powers` [l]; `doppler` in turns a step."""
    taps = np.empty((batch, num_steps, len(powers)), np.complex64)
    times = np.arange(num_steps, dtype=np.float32) * np.float32(doppler)
    amplitudes = np.sqrt(powers).astype(np.float32)

    def piece(rng: np.random.Generator, rows: slice) -> None:
        drawn = _spectral_sum(rng, (taps[rows].shape[0], len(powers)), times, num_paths)
        taps[rows] = np.swapaxes(drawn, 1, 2) * amplitudes

    return _threaded(piece, batch, taps)


def _spectral_sum(rng: np.random.Generator, shape: tuple[int, ...], turns: np.ndarray, paths: int) -> np.ndarray:
    """Sum over paths, [*shape t], of CN(0, 1/M) amplitudes rotating at cos(angle) turns."""
    sectors = np.arange(paths, dtype=np.float32)
    angles = (rng.random((*shape, paths), dtype=np.float32) + sectors) * np.float32(2 * np.pi / paths)
    amplitudes = _complex_normal(rng, (*shape, 1, paths), 1 / paths)
    phases = np.cos(angles)[..., np.newaxis] * (np.float32(2 * np.pi) * turns)
    rotations = np.empty(phases.shape, np.complex64)
    np.cos(phases, out=rotations.real)
    np.sin(phases, out=rotations.imag)
    return (amplitudes @ rotations)[..., 0, :]


def _complex_normal(rng: np.random.Generator, shape: tuple[int, ...], variance: float = 1.0) -> np.ndarray:
    reals = rng.standard_normal((*shape[:-1], 2 * shape[-1]), dtype=np.float32)
    reals *= np.float32(np.sqrt(variance / 2))
    return reals.view(np.complex64)


def _threaded(piece: Callable[[np.random.Generator, slice], None], num: int, result: np.ndarray) -> Callable:
    """A call that runs `piece` over all rows, each thread with its own generator (SFC64, NumPy's fastest)."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    rngs = [np.random.Generator(np.random.SFC64(seed)) for seed in range(workers)]

    def share(worker: int) -> None:
        for start in range(worker * PIECE, num, workers * PIECE):
            piece(rngs[worker], slice(start, min(start + PIECE, num)))

    def call() -> np.ndarray:
        list(pool.map(share, range(workers)))
        return result

    return call
