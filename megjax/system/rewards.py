"""Image quality as a reward for power control."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.channel import MAPPINGS
from megjax.channel.numerics import squared_magnitude
from megjax.codec import SeedCodec, SeedNetwork, link
from megjax.configs import require
from megjax.diffusion import generation
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import threefry
from megjax.metrics import psnr
from megjax.units import db_to_linear


def image_quality(
    pipe: StableDiffusion,
    codec: SeedCodec,
    latents: Float[Array, "n h w c"],
    num_symbols: int,
    mapping: str = "ordered",
    reference: Callable[[Float[Array, " t"], Float[Array, ""]], Float[Array, " t"]] | None = None,
) -> Callable[..., Float[Array, ""]]:
    """`(key, gains [t], power [t], snr_db) -> PSNR` in dB of the image decoded from a seed sent at these powers.

    The key draws one of `latents` and the noise; the PSNR is against the image decoded from the clean latent. With
    `reference(power gains [t], snr_db) -> power [t]` the result is the gain over those powers on the same image, gains
    and noise, which spreads far less. Made for `PowerControl(quality=...)`. ValueError for a bad number of symbols or
    mapping.
    """
    network: SeedNetwork = nnx.merge(codec.graph, codec.state)
    link.check_symbols(num_symbols, codec.config.num_values, 1)
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    latents = jnp.asarray(latents)
    originals = jnp.concatenate([pipe.decode(latents[i : i + 100]) for i in range(0, len(latents), 100)])

    def quality(key, gains, power, snr_db):
        image_key, noise_key = jax.random.split(threefry(key))
        index = jax.random.randint(image_key, (), 0, len(latents), jnp.int32)
        spending = link.spending(network.spend(snr_db, num_symbols), num_symbols, gains.shape[0], mapping)
        values = network.encode(latents[index][None], snr_db, num_symbols)[0]
        levels = jnp.full(1, snr_db, jnp.float32), jnp.full(1, num_symbols)

        def decode(power):
            received = link.send_code(
                jax.random.clone(noise_key), values, spending, gains, power, db_to_linear(-snr_db), num_symbols, mapping
            )
            return network.decode(received.estimate[None], received.snr[None], *levels)[0]

        sent = [decode(power)]
        if reference is not None:
            sent.append(decode(reference(squared_magnitude(gains), snr_db)))
        images = generation.decode(pipe.graphs, pipe.params, jnp.stack(sent))
        found = psnr(originals[index], images[0])
        return found if reference is None else found - psnr(originals[index], images[1])

    return quality
