"""Large features in strips of rows, one after the other: on a CPU they stay in its caches, and need less memory."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MANY_ELEMENTS = 2**24
"""Elements of one image's features, or of what is made of them, from which on strips pay: 64 MiB of float32."""
_ELEMENTS_OF_A_STRIP = 2**20


def pay(x: Float[Array, "b h w c"], growth: int = 1) -> bool:
    """Whether an image's features, or a result of `growth` times their elements, are large.

    Several devices would exchange their images for strips: there it is False.
    """
    return growth * math.prod(x.shape[1:]) >= MANY_ELEMENTS and jax.device_count() == 1


def in_strips(
    convolve: Callable[[Array], Array], x: Float[Array, "b h w c"], prepare: Callable[[Array, Array], Array]
) -> Float[Array, "b h2 w2 d"]:
    """A convolution over windows of three rows, of prepared features; gradients are right, but no faster than whole.

    Args:
      convolve: [1 r+2 w c] -> [1 s*r w2 d], for any number of rows r, its windows within the rows given.
      prepare: (rows [1 r w c], index of the image) -> prepared rows; those beyond the image are zero.
    """
    batch, height, width, channels = x.shape
    rows = max(1, min(height, _ELEMENTS_OF_A_STRIP // (width * channels)))
    rows -= rows % 2 if 1 < rows < height else 0  # Winograd's tiles are two rows high
    of_strip = jax.eval_shape(convolve, jax.ShapeDtypeStruct((1, rows + 2, width, channels), x.dtype))
    per_image, growth = -(-height // rows), of_strip.shape[1] // rows

    def taken(image, first, size):
        return prepare(jax.lax.dynamic_slice(x, (image, first, 0, 0), (1, size, width, channels)), image)

    def body(i, out):
        image, strip = jnp.divmod(i, per_image)
        first = jnp.minimum(strip * rows, height - rows)  # the last strip makes some rows again
        above = jnp.where(first > 0, taken(image, jnp.maximum(first - 1, 0), 1), 0)
        below = jnp.where(first + rows < height, taken(image, jnp.minimum(first + rows, height - 1), 1), 0)
        made = convolve(jnp.concatenate([above, taken(image, first, rows), below], axis=1))
        return jax.lax.dynamic_update_slice(out, made, (image, first * growth, 0, 0))

    # Without this zero, XLA:CPU would make room for the results of all layers at the start of a program.
    zero = jnp.minimum(jnp.abs(jax.lax.stop_gradient(x[0, 0, 0, 0])), 0).astype(of_strip.dtype)
    out = jnp.broadcast_to(zero, (batch, growth * height, *of_strip.shape[2:]))
    return jax.lax.fori_loop(0, batch * per_image, body, out)
