"""What the devices receive of a batch and how good it is, as one compiled program a point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from megjax.metrics import psnr, ssim
from megjax.metrics.scenenet import caption_accuracy, labels_from_logits
from megjax.system import Code, Delivery, Simulator, Source

PICTURES = 4
"""First images of a point that are kept as pictures, as the first realisation brings them."""


def devices_for(count: int, factorises: bool) -> Mesh:
    """The local devices if they divide a batch of this size, else the first of them.

    A program that factorises matrices has one CPU device alone: LAPACK calls of two at once have been seen to wait for
    each other forever (JAX 0.10.2).
    """
    devices = np.asarray(jax.local_devices())
    if factorises and devices[0].platform == "cpu":
        devices = devices[:1]
    return Mesh(devices if count % len(devices) == 0 else devices[:1], ("data",))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def receive(simulator: Simulator, graphs, shown: bool, mesh: Mesh, *values) -> dict[str, Array]:
    """What the receptions of a batch give, by name, [b r ...]; each device takes its share of the images.

    No device waits for another. `graphs` are those of SceneNet and of Inception, None where there is none; `values` are
    their states, key and parameters of the simulator, SNR, guidance and realisations, and by image the source, token
    ids, numbers, (labels, stated) or None, and the code where the host makes it.
    """
    whole, split = PartitionSpec(), PartitionSpec("data")
    code = None if values[-1] is None else Code(split, whole, split, split, whole)
    specs = (whole,) * 6 + (split,) * 4 + (code,)
    share = functools.partial(_receptions, simulator, graphs, shown)
    spread = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return spread(*values)


def _receptions(
    simulator: Simulator,
    graphs,
    shown: bool,
    states,
    key,
    params,
    snr_db,
    guidance,
    numbers,
    source,
    ids,
    images,
    truth,
    code,
) -> dict[str, Array]:
    delivery = simulator.deliver(
        key, params, source, ids, snr_db, images, numbers, guidance_scale=guidance, generate=shown, code=code
    )
    size = delivery.gains.shape[:2]
    found: dict[str, Array] = {
        "num_symbols": jnp.broadcast_to(delivery.num_symbols[:, None], size),
        "energy": delivery.energy,
    }
    if delivery.latents is not None:
        found["squared_error"] = jnp.square(delivery.latents - source.latents[:, None]).sum((2, 3, 4))
    if shown:
        found |= _compare(delivery, source)
        found["pictures"] = delivery.images[:PICTURES, :1]
    if not shown:
        return found
    flat = delivery.images.reshape(-1, *delivery.images.shape[2:])
    scenenet, inception = (None if g is None else nnx.merge(g, s) for g, s in zip(graphs, states, strict=True))
    if inception is not None:
        found["inception"] = inception.features(flat).reshape(*size, -1)
    if scenenet is not None:
        features, logits = scenenet(flat)
        found["features"] = features.reshape(*size, -1)
        if truth is not None:
            labels, stated = (jnp.repeat(x, size[1], axis=0) for x in truth)
            share, _, _ = caption_accuracy(labels_from_logits(logits), labels, stated)
            found["caption_accuracy"] = share.reshape(size)
    return found


def _compare(delivery: Delivery, source: Source) -> dict[str, Float[Array, "b r"]]:
    over = jax.vmap(jax.vmap(lambda a, b: (psnr(a, b), ssim(a, b)), (None, 0)))
    quality, likeness = over(source.images, delivery.images)
    return {"psnr_db": quality, "ssim": likeness}
