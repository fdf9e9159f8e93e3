"""What a link of a scheme is, and what the server gives it: seed coding, transmission and decoding as pure functions.

A link is static; its parameters are a pytree that is handed to every method, so that they can be swept and
differentiated. The link is simulated at mean power 1 and noise variance sigma^2 / P, which is the same physics as mean
power P and sigma^2. SNRs called effective are P / sigma^2.
"""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Key, PyTree

RESULTS = ("latents", "images", "noisy", "error")
"""Kinds of results of a link's `decode`: clean latents, finished images, latents that the device has yet to denoise, or
the squared error of a latent that nobody decodes, from a bound."""


class Source(NamedTuple):
    """What the server has made of a batch of prompts."""

    latents: Float[Array, "b h w c"]
    images: Float[Array, "b H W 3"] | None
    """None where only latents are asked for."""
    partial: Float[Array, "b h w c"]
    """Latents after the server's share of the denoising steps: `latents` unless the device finishes them."""


class Code(NamedTuple):
    """What is sent of a batch of images at one SNR, the same in every realisation."""

    payload: PyTree
    """Leaves [b ...], one entry for each image."""
    shared: PyTree
    """What transmitter and receiver know without being told: it depends on SNR and rate only."""
    num_symbols: Float[Array, "*b"]
    """K, of all images or of each."""
    mean_power: Float[Array, "*b"]
    """P, of all images or of each."""
    load: Float[Array, " t"]
    """Power of the blocks in units of P that the code itself asks for, mean 1."""


class Noisy(NamedTuple):
    """A variance-preserving latent and its noise level, which the device goes on denoising from."""

    latents: Float[Array, "n h w c"]
    alpha_bar: Float[Array, " n"]


@runtime_checkable
class Link(Protocol):
    """One scheme's link over the channel; hashable, its parameters are the first argument of the methods."""

    num_blocks: int
    """T."""
    num_symbols: int | None
    """K; None where each image has its own, known only when it is coded."""
    result: ClassVar[str]
    """One of `RESULTS`."""
    on_host: ClassVar[bool]
    """Whether `code` works on the host and is best called outside of compiled programs."""

    def code(self, params: Any, source: Source, snr_db: Float[ArrayLike, ""], energy: float | None) -> Code:
        """Seed coding: what to send of every image at this 1 / sigma^2.

        `energy` is the energy per image in units of one symbol at power 1, so that P = energy / K; None for P = 1.
        """

    def transmit(
        self,
        params: Any,
        key: Key[Array, ""],
        payload: PyTree,
        shared: PyTree,
        gains: Complex[Array, " t"],
        power: Float[Array, " t"],
        noise_var: Float[Array, ""],
    ) -> PyTree:
        """What the receiver makes of one image over one realisation, at powers in units of P."""

    def decode(self, params: Any, received: PyTree, shared: PyTree) -> Any:
        """What `result` says, of n received images: latents [n h w c], images [n H W 3], `Noisy` or errors [n]."""


def mean_power(num_symbols: ArrayLike, energy: float | None) -> Float[Array, "*b"]:
    """P = energy / K, or 1 without a given energy."""
    count = jnp.asarray(num_symbols, jnp.float32)
    return jnp.ones_like(count) if energy is None else energy / count
