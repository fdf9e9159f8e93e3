"""Channel rollouts in NumPy, as a careful user writes them: threads, float32, cache-sized pieces, reused output."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from eval.measure import num_cores

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
    """A call that draws Clarke/Jakes gains [b t]: the law of `megjax.channel.JakesFading`, an angle in each sector."""
    gains = np.empty((batch, num_blocks), np.complex64)
    turns = np.arange(num_blocks, dtype=np.float32) * np.float32(2 * np.pi * doppler)
    sectors = np.arange(num_paths, dtype=np.float32)

    def piece(rng: np.random.Generator, rows: slice) -> None:
        count = gains[rows].shape[0]
        angles = (rng.random((count, num_paths), dtype=np.float32) + sectors) * np.float32(np.pi / num_paths)
        phases = np.cos(angles)[..., np.newaxis] * turns
        rotations = np.empty(phases.shape, np.complex64)
        np.cos(phases, out=rotations.real)
        np.sin(phases, out=rotations.imag)
        gains[rows] = (_complex_normal(rng, (count, 1, num_paths), 1 / num_paths) @ rotations)[:, 0]

    return _threaded(piece, batch, gains)


def tdl(batch: int, num_steps: int, doppler: float, powers: np.ndarray, num_paths: int) -> Callable[[], np.ndarray]:
    """A call that draws taps [b t l] with these `powers` [l]; `doppler` in turns a step.

    The law and the algorithm of `megjax.channel.TDL`: evenly spaced angles that the taps share, turned by a random one,
    opposite paths in pairs, hence one real matrix of phases a realisation.
    """
    taps = np.empty((batch, num_steps, len(powers)), np.complex64)
    turns = np.arange(num_steps, dtype=np.float32) * np.float32(2 * np.pi * doppler)
    amplitudes = np.sqrt(2 / num_paths * powers).astype(np.float32)[:, np.newaxis]
    pairs = np.arange(num_paths // 2, dtype=np.float32)

    def piece(rng: np.random.Generator, rows: slice) -> None:
        count = taps[rows].shape[0]
        angles = (rng.random((count, 1), dtype=np.float32) + pairs) * np.float32(2 * np.pi / num_paths)
        phases = turns[:, np.newaxis] * np.cos(angles)[:, np.newaxis]
        waves = np.concatenate([np.cos(phases), np.sin(phases)], axis=2)
        paths = _complex_normal(rng, (count, len(powers), num_paths)) * amplitudes
        taps.real[rows] = waves @ np.swapaxes(paths.real, 1, 2)
        taps.imag[rows] = waves @ np.swapaxes(paths.imag, 1, 2)

    return _threaded(piece, batch, taps)


def _complex_normal(rng: np.random.Generator, shape: tuple[int, ...], variance: float = 1.0) -> np.ndarray:
    reals = rng.standard_normal((*shape[:-1], 2 * shape[-1]), dtype=np.float32)
    reals *= np.float32(np.sqrt(variance / 2))
    return reals.view(np.complex64)


def _threaded(piece: Callable[[np.random.Generator, slice], None], num: int, result: np.ndarray) -> Callable:
    """A call that runs `piece` over all rows, each thread with its own generator (SFC64, NumPy's fastest)."""
    workers = num_cores()
    pool = ThreadPoolExecutor(workers)
    rngs = [np.random.Generator(np.random.SFC64(seed)) for seed in range(workers)]

    def share(worker: int) -> None:
        for start in range(worker * PIECE, num, workers * PIECE):
            piece(rngs[worker], slice(start, min(start + PIECE, num)))

    def call() -> np.ndarray:
        list(pool.map(share, range(workers)))
        return result

    return call
