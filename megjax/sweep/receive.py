"""Receiving a batch of images over the link and measuring what has arrived, as one compiled program a point."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from megjax.metrics import Received
from megjax.metrics.base import measurable
from megjax.sharding import data_mesh
from megjax.system import Code, Delivery, Simulator, Source

PICTURES = 4
"""First images of a point that are kept as pictures, as the first realisation brings them."""


class Network(NamedTuple):
    """A feature network as a static graph and its parameters."""

    name: str
    graph: nnx.GraphDef
    state: Any


class Common(NamedTuple):
    """Inputs that all images of a batch share."""

    states: tuple[Any, ...]
    """Parameters of the feature networks."""
    key: Array
    params: dict[str, Any]
    """Parameters of the simulator."""
    snr_db: Any
    guidance: Any
    realisations: Any
    """Numbers of the realisations."""


class Batch(NamedTuple):
    """Inputs of every image."""

    source: Source
    ids: Any
    images: Any
    """Numbers of the images."""
    captions: tuple[Any, Any] | None
    """Attributes, and which of them the caption states."""
    code: Code | None
    """The code where the host makes it."""


def devices_for(count: int, factorises: bool) -> Mesh:
    """The local devices if they divide a batch of this size, else the first of them.

    A program that factorises matrices has one CPU device alone: LAPACK calls of two at once have been seen to wait for
    each other forever (JAX 0.10.2).
    """
    devices = jax.local_devices()
    return data_mesh(count, devices[:1] if factorises and devices[0].platform == "cpu" else devices)


def receive(
    simulator: Simulator, networks: tuple[Network, ...], shown: bool, mesh: Mesh, common: Common, batch: Batch
) -> dict[str, Array]:
    """Values of all metrics that can be measured, and K, energy and pictures, by name, [b r ...].

    Each device takes its share of the images, and none waits for another. Without `shown` no image is made.
    """
    graphs = tuple((network.name, network.graph) for network in networks)
    common = common._replace(states=tuple(network.state for network in networks))
    return _spread(simulator, graphs, shown, mesh, common, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _spread(simulator: Simulator, graphs, shown: bool, mesh: Mesh, common: Common, batch: Batch) -> dict[str, Array]:
    whole, split = PartitionSpec(), PartitionSpec("data")
    code = None if batch.code is None else Code(split, whole, split, split, whole)
    specs = Batch(split, split, split, split, code)
    share = functools.partial(_receptions, simulator, graphs, shown)
    spread = jax.shard_map(share, mesh=mesh, in_specs=(whole, specs), out_specs=split, check_vma=False)
    return spread(common, batch)


def _receptions(simulator: Simulator, graphs, shown: bool, common: Common, batch: Batch) -> dict[str, Array]:
    delivery = simulator.deliver(
        common.key,
        common.params,
        batch.source,
        batch.ids,
        common.snr_db,
        batch.images,
        common.realisations,
        guidance_scale=common.guidance,
        generate=shown,
        code=batch.code,
    )
    size = delivery.gains.shape[:2]
    found: dict[str, Array] = {
        "num_symbols": jnp.broadcast_to(delivery.num_symbols[:, None], size),
        "energy": delivery.energy,
    }
    received = Received(
        delivery.images if shown else None,
        batch.source.images,
        _latent_error(delivery, batch.source),
        batch.captions,
        {name: nnx.merge(graph, state) for (name, graph), state in zip(graphs, common.states, strict=True)},
    )
    for metric in measurable(received.has):
        if metric.collected not in found:
            found[metric.collected] = metric.compute(received)
    if received.images is not None:
        found["pictures"] = delivery.images[:PICTURES, :1]
    return found


def _latent_error(delivery: Delivery, source: Source) -> Array | None:
    """Squared errors [b r] of the received latents; None where pixels are sent."""
    if delivery.latents is None:
        return delivery.error
    return jnp.square(delivery.latents - source.latents[:, None]).sum((2, 3, 4))
