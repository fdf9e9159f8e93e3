"""Realisations of fading laws, drawn by one compiled program for each law and shape, whatever the law's parameters."""

import functools

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample_many(law, key, num, num_blocks):
    return jax.vmap(lambda key: law.sample(key, num_blocks))(jax.random.split(key, num))


@functools.partial(jax.jit, static_argnums=2)
def _sample_one(law, key, num_blocks):
    return law.sample(key, num_blocks)


def realisations(law, seed, num, num_blocks):
    """`num` realisations, one an entry of the first axis."""
    return np.asarray(_sample_many(law, jax.random.key(seed), num, num_blocks))


def draw(law, seed, num_blocks):
    """One realisation."""
    return np.asarray(_sample_one(law, jax.random.key(seed), num_blocks))


def normal_symbols(seed, shape):
    """CN(0, 1) numbers complex64 of this shape, from NumPy: nothing is compiled for them."""
    parts = np.random.default_rng(seed).standard_normal((2, *shape)) * np.sqrt(0.5)
    return (parts[0] + 1j * parts[1]).astype(np.complex64)
