"""Image quality as a reward for power control."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.channel import MAPPINGS
from megjax.codec import SeedCodec
from megjax.codec.coders import LearnedCoder
from megjax.codec.link import check_symbols
from megjax.configs import require
from megjax.diffusion import generation
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import threefry
from megjax.metrics import psnr
from megjax.numerics import squared_magnitude
from megjax.system.protocol import Source
from megjax.system.schemes import AnalogLink
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
    coder = LearnedCoder(codec.graph, codec.state)
    check_symbols(num_symbols, codec.config.num_values, 1)
    require(mapping in MAPPINGS, "mapping", mapping, f"one of {MAPPINGS}")
    latents = jnp.asarray(latents)
    originals = jnp.concatenate([pipe.decode(latents[i : i + 100]) for i in range(0, len(latents), 100)])

    def quality(key, gains, power, snr_db):
        image_key, noise_key = jax.random.split(threefry(key))
        index = jax.random.randint(image_key, (), 0, len(latents), jnp.int32)
        link, chosen = AnalogLink(num_symbols, gains.shape[0], mapping), latents[index][None]
        code = link.code(coder, Source(chosen, None, chosen), snr_db, None)
        payload, noise_var = code.payload[0], db_to_linear(-snr_db)

        def decode(power):
            key = jax.random.clone(noise_key)
            received = link.transmit(coder, key, payload, code.shared, gains, power, noise_var)
            return link.decode(coder, jax.tree.map(lambda x: x[None], received), code.shared)[0]

        sent = [decode(power)]
        if reference is not None:
            sent.append(decode(reference(squared_magnitude(gains), snr_db)))
        images = generation.decode(pipe.graphs, pipe.params, jnp.stack(sent))
        found = psnr(originals[index], images[0])
        return found if reference is None else found - psnr(originals[index], images[1])

    return quality
