"""One realisation of a link, drawn, powered and transmitted; every transmission of the library goes through here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Float, Key, PyTree

from megjax.channel import Fading, post_equalisation_snr, symbols_per_block
from megjax.codec import link as codec_link
from megjax.codec.coders import Coder
from megjax.codec.importance import block_power
from megjax.keys import threefry
from megjax.system.protocol import Code, Link, Source
from megjax.units import noise_var_from_snr_db


class Realisation(NamedTuple):
    """One image over one realisation of the gains and the noise."""

    received: PyTree
    """What the link's `transmit` gives, before decoding."""
    gains: Complex[Array, " t"]
    power: Float[Array, " t"]
    """Power of the blocks in units of P."""


def realisation_keys(key: Key[Array, ""], images: ArrayLike, realisation: ArrayLike = 0) -> Key[Array, " b"]:
    """Keys of one realisation, or of one each [b], for the images of these numbers [b]; they depend on nothing else."""
    images, key = jnp.asarray(images), threefry(key)

    def one(image, realisation):
        return jax.random.fold_in(jax.random.fold_in(key, image), realisation)

    return jax.vmap(one)(images, jnp.broadcast_to(jnp.asarray(realisation), images.shape))


def draw_gains(keys: Key[Array, " b"], fading: Fading, num_blocks: int) -> Complex[Array, "b t"]:
    """The complex gains [b t] that `realise` draws from these keys."""
    return jax.vmap(lambda key: fading.sample(jax.random.split(key)[0], num_blocks))(threefry(keys))


def realise(
    link: Link,
    params: Any,
    key: Key[Array, ""],
    code: Code,
    fading: Fading,
    noise_var: Float[Array, ""],
    allocate: Callable[[Complex[Array, " t"]], Float[Array, " t"]],
) -> Realisation:
    """Draw the gains of one image, let `allocate` set the blocks' power for them, and transmit.

    The first half of the key gives the gains, which depend on it and the number of blocks only, so that schemes and
    policies with the same key see the same gains; the second half gives the noise. `code.payload` is that of the one
    image. `noise_var` is sigma^2 / P, and powers are in units of P.
    """
    gain_key, noise_key = jax.random.split(threefry(key))
    gains = fading.sample(gain_key, link.num_blocks)
    power = within_budget(link, allocate(gains))
    received = link.transmit(params, noise_key, code.payload, code.shared, gains, power, noise_var)
    return Realisation(received, gains, power)


def within_budget(link: Link, power: Float[Array, " t"]) -> Float[Array, " t"]:
    """Powers cut where blocks of different length would radiate more than K P; in order, so that it is causal."""
    if not _uneven(link):
        return power
    lengths = jnp.asarray(symbols_per_block(link.num_symbols, link.num_blocks), jnp.float32)

    def step(left, block):
        length, wanted = block
        given = jnp.minimum(wanted, left / length)
        return left - length * given, given

    return jax.lax.scan(step, jnp.float32(link.num_symbols), (lengths, power))[1]


def scaled_load(link: Link, load: Float[Array, " t"]) -> Float[Array, " t"]:
    """A load that is known beforehand, scaled down to K P as a whole where longer blocks would take more."""
    return load / jnp.maximum(jnp.sum(load * symbol_shares(link)), 1.0) if _uneven(link) else load


def symbol_shares(link: Link) -> Float[Array, " t"]:
    """Share of the symbols in each block: equal ones where K is 0 or known only when the link runs."""
    if not link.num_symbols:
        return jnp.full(link.num_blocks, 1 / link.num_blocks, jnp.float32)
    counts = symbols_per_block(link.num_symbols, link.num_blocks)
    return jnp.asarray(counts, jnp.float32) / jnp.float32(link.num_symbols)


def _uneven(link: Link) -> bool:
    """Whether some blocks carry a symbol more than others."""
    return bool(link.num_symbols) and link.num_symbols % link.num_blocks != 0


def send_latents(
    link: Link,
    coder: Coder,
    keys: Key[Array, " b"],
    latents: Float[Array, "b h w c"],
    snr_db: Float[ArrayLike, ""],
    fading: Fading,
    power: str | Float[Array, " t"] = "codec",
) -> tuple[Float[Array, "b h w c"], Float[Array, "b t"]]:
    """Latents received over an `AnalogLink` and linear SNRs of the blocks, one realisation for each latent.

    `snr_db` is the effective P / sigma^2; `power` is one of `codec.importance.POWERS`, or the blocks' power in units of
    P. Raises ValueError for another power.
    """
    code = link.code(coder, Source(latents, None, latents), snr_db, None)
    shares = block_power(codec_link.Spending(code.load, code.load), power)
    noise_var = noise_var_from_snr_db(snr_db)

    def one(key, payload):
        made = realise(link, coder, key, code._replace(payload=payload), fading, noise_var, lambda gains: shares)
        return made.received, post_equalisation_snr(made.gains, made.power, noise_var)

    received, block_snr = jax.vmap(one)(keys, code.payload)
    return link.decode(coder, received, code.shared), block_snr
