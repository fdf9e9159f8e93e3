"""Painters of the procedural scenes: planar [3 s s] pictures built from anti-aliased signed-distance layers.

Coordinates are fractions of the picture's side, y downwards. Objects use local coordinates (u, v) in [-1, 1], v
downwards; every pixel column belongs to the slot it lies in, so one evaluation of each shape serves all three slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megjax.precision import exact_matmul

Picture = Float[Array, "3 s s"]
Map = Float[Array, "#s #s"]

# Rows: dawn, day, sunset, night.
SKY_TOP = np.array([[0.50, 0.58, 0.86], [0.26, 0.55, 0.90], [0.36, 0.22, 0.50], [0.05, 0.07, 0.21]], np.float32)
SKY_LOW = np.array([[1.00, 0.83, 0.80], [0.82, 0.93, 0.98], [1.00, 0.55, 0.24], [0.22, 0.28, 0.50]], np.float32)
OBJECT_LIGHT = np.array([[0.97, 0.92, 0.95], [1.0, 1.0, 1.0], [1.00, 0.88, 0.80], [0.90, 0.88, 0.95]], np.float32)
GROUND_LIGHT = np.array([[0.93, 0.85, 0.92], [1.0, 1.0, 1.0], [0.88, 0.64, 0.56], [0.47, 0.45, 0.60]], np.float32)
CLOUD_TOP = np.array([[1.00, 0.92, 0.90], [1.00, 1.00, 1.00], [1.00, 0.76, 0.58], [0.58, 0.62, 0.78]], np.float32)
CLOUD_LOW = np.array([[0.90, 0.72, 0.78], [0.78, 0.86, 0.94], [0.82, 0.46, 0.48], [0.34, 0.38, 0.56]], np.float32)
ORB = np.array([[1.00, 0.95, 0.76], [1.00, 0.94, 0.55], [1.00, 0.80, 0.36], [0.97, 0.95, 0.84]], np.float32)
ORB_GLOW = np.array([0.60, 0.55, 0.65, 0.30], np.float32)
ORB_RADIUS = np.array([0.066, 0.062, 0.074, 0.062], np.float32)
ORB_Y = np.array([0.27, 0.15, 0.28, 0.15], np.float32)
# Rows: meadow, desert, snow, sea; far is at the horizon, near at the viewer.
GROUND_FAR = np.array([[0.66, 0.80, 0.42], [0.96, 0.84, 0.60], [0.96, 0.98, 1.00], [0.46, 0.76, 0.82]], np.float32)
GROUND_NEAR = np.array([[0.44, 0.66, 0.30], [0.85, 0.64, 0.38], [0.82, 0.88, 0.96], [0.10, 0.42, 0.58]], np.float32)
# Rows: red, orange, yellow, green, blue, purple, white.
BODY = np.array(
    [[0.87, 0.17, 0.16], [0.98, 0.51, 0.08], [1.00, 0.85, 0.16], [0.12, 0.57, 0.30], [0.14, 0.38, 0.88]]
    + [[0.57, 0.24, 0.74], [0.97, 0.97, 0.97]],
    np.float32,
)
SHADE = np.array(
    [[0.57, 0.08, 0.13], [0.76, 0.33, 0.04], [0.82, 0.60, 0.06], [0.04, 0.36, 0.21], [0.07, 0.20, 0.58]]
    + [[0.35, 0.12, 0.50], [0.60, 0.66, 0.78]],
    np.float32,
)
WHITE = np.array([1.0, 1.0, 1.0], np.float32)
WOOD = np.array([0.45, 0.29, 0.19], np.float32)
TYRE = np.array([0.17, 0.17, 0.21], np.float32)
GLASS = np.array([0.74, 0.87, 0.94], np.float32)
LAMP = np.array([1.00, 0.86, 0.45], np.float32)


def fill(distance: Map, pixel: Array | float) -> Map:
    """Coverage in [0, 1] of a shape by its signed distance (negative inside), ramping over one `pixel`."""
    return jnp.clip(0.5 - distance / pixel, 0.0, 1.0)


def smooth(low: float, high: float, x: Map) -> Map:
    """Smoothstep from 0 at `low` to 1 at `high`."""
    t = jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def box(u: Map, v: Map, centre: tuple[float, float], half: tuple[float, float], rounding: float = 0.0) -> Map:
    """Signed distance to a box with rounded corners; sharp corners use the chessboard distance."""
    a = jnp.abs(u - centre[0]) - half[0] + rounding
    b = jnp.abs(v - centre[1]) - half[1] + rounding
    if not rounding:
        return jnp.maximum(a, b)
    outside = jnp.sqrt(jnp.maximum(a, 0.0) ** 2 + jnp.maximum(b, 0.0) ** 2)
    return outside + jnp.minimum(jnp.maximum(a, b), 0.0) - rounding


def circle(u: Map, v: Map, centre: tuple[float, float], radius: float) -> Map:
    """Signed distance to a disc."""
    return jnp.sqrt((u - centre[0]) ** 2 + (v - centre[1]) ** 2) - radius


def trapezoid(u: Map, v: Map, top: float, bottom: float, half_top: float, half_bottom: float) -> Map:
    """Signed distance (max of half planes) to a trapezoid symmetric about u = 0, between v = top and v = bottom."""
    slope = (half_bottom - half_top) / (bottom - top)
    side = (jnp.abs(u) - half_top - slope * (v - top)) / np.sqrt(1.0 + slope**2).astype(np.float32)
    return jnp.maximum(side, jnp.maximum(top - v, v - bottom))


def over(picture: Picture, colour: Array | np.ndarray, alpha: Map) -> Picture:
    """Paints `colour` ([3] or [3 s s], broadcastable) over the picture with opacity `alpha`."""
    colour = jnp.reshape(colour, (3, 1, 1)) if colour.ndim == 1 else colour
    return picture + (colour - picture) * alpha[None]


def value_noise(key: Array, rows: int, columns: int, size: int) -> Float[Array, "s s"]:
    """Smooth noise of unit variance at its nodes: a random [rows columns] lattice, cosine-interpolated."""

    def weights(nodes: int) -> np.ndarray:
        position = (np.arange(size) + 0.5) / size * (nodes - 1)
        distance = np.minimum(np.abs(position[:, None] - np.arange(nodes)[None]), 1.0)
        return (0.5 + 0.5 * np.cos(np.pi * distance)).astype(np.float32)

    nodes = jax.random.normal(key, (rows, columns), jnp.float32)
    return exact_matmul(exact_matmul(weights(rows), nodes), weights(columns).T)


class Grid(NamedTuple):
    """Pixel centres `x` [1 s], `y` [s 1] and the width of a pixel, all in picture sides."""

    x: Float[Array, "1 s"]
    y: Float[Array, "s 1"]
    pixel: float


def make_grid(size: int) -> Grid:
    """Pixel centres of a square picture."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return Grid(jnp.asarray(centres)[None], jnp.asarray(centres)[:, None], 1.0 / size)


def bumps(
    grid: Grid, x: Float[Array, " n"], y: Float[Array, " n"], width: Array | float, height: Array | float
) -> Float[Array, "s s"]:
    """Sum of n separable Gaussian bumps of unit height; `width` and `height` are standard deviations, [n] or one."""
    width, height = jnp.broadcast_to(width, x.shape), jnp.broadcast_to(height, x.shape)
    across = jnp.exp(-0.5 * ((grid.x - x[:, None]) / width[:, None]) ** 2)
    down = jnp.exp(-0.5 * ((grid.y - y[None]) / height[None]) ** 2)
    return exact_matmul(down, across)


def sky(
    draws: Float[Array, "29"], grid: Grid, time: Array, horizon: Array, is_cloudy: Array, orb: Array, orb_x: Array
) -> Picture:
    """Gradient sky with stars at night, a sun or moon where `orb` is 1 and clouds where `is_cloudy` is 1.

    `draws` are uniform in [-1, 1].
    """
    low, top = jnp.asarray(SKY_LOW)[time], jnp.asarray(SKY_TOP)[time]
    t = jnp.broadcast_to(jnp.clip(grid.y / horizon, 0.0, 1.0) ** 1.3, (grid.y.size, grid.x.size))
    picture = top[:, None, None] + (low - top)[:, None, None] * t[None]

    spot = 0.5 + 0.5 * draws[:18].reshape(2, 9)
    stars = bumps(
        grid, (jnp.arange(9, dtype=jnp.float32) + 0.15 + 0.7 * spot[0]) / 9, 0.03 + 0.32 * spot[1], 0.011, 0.011
    )
    strength = jnp.where(time == 3, 0.5, 0.0) * (1.0 - is_cloudy)
    picture = over(picture, ORB[3], jnp.clip(strength * stars, 0.0, 1.0))

    colour, radius = jnp.asarray(ORB)[time], jnp.asarray(ORB_RADIUS)[time]
    orb_y = jnp.asarray(ORB_Y)[time] + 0.02 * draws[18]
    wide = jnp.array([0.30, 0.11], jnp.float32)
    glow = bumps(grid, jnp.full(2, orb_x), jnp.full(2, orb_y), wide, 0.8 * wide)
    picture = over(picture, 0.5 + 0.5 * colour, jnp.clip(orb * 0.5 * jnp.asarray(ORB_GLOW)[time] * glow, 0.0, 1.0))
    distance = jnp.sqrt((grid.x - orb_x) ** 2 + (grid.y - orb_y) ** 2) - radius
    picture = over(picture, colour, orb * fill(distance, grid.pixel))
    seas = bumps(
        grid,
        orb_x + jnp.array([-0.02, 0.022], jnp.float32),
        orb_y + jnp.array([-0.01, 0.018], jnp.float32),
        0.014,
        0.012,
    )
    picture = over(picture, 0.8 * colour, jnp.where(time == 3, 0.5, 0.0) * orb * jnp.clip(seas, 0.0, 1.0))
    return _clouds(draws[19:29], picture, grid, time, is_cloudy)


def _clouds(draws: Float[Array, "10"], picture: Picture, grid: Grid, time: Array, strength: Array) -> Picture:
    """Two large clouds near the slot boundaries and, half of the time, a small third one."""
    jitter = draws[:9].reshape(3, 3)
    cx = jnp.array([0.27, 0.72, 0.50], jnp.float32) + 0.06 * jitter[0]
    cy = jnp.array([0.13, 0.19, 0.07], jnp.float32) + 0.025 * jitter[1]
    scale = jnp.array([1.0, 0.9, 0.6], jnp.float32) * (1.0 + 0.12 * jitter[2])
    puff = np.array([[-0.085, 0.012], [0.0, -0.022], [0.085, 0.010]], np.float32)
    body, line = jnp.zeros_like(picture[0]), jnp.zeros_like(picture[0])
    third = (draws[9] > 0.0).astype(jnp.float32)
    for i, present in enumerate((1.0, 1.0, third)):
        x, y = cx[i] + scale[i] * puff[:, 0], cy[i] + scale[i] * puff[:, 1]
        density = bumps(
            grid,
            x,
            y,
            scale[i] * jnp.array([0.050, 0.062, 0.048], jnp.float32),
            scale[i] * jnp.array([0.030, 0.042, 0.028], jnp.float32),
        )
        depth = (grid.y - cy[i]) / scale[i]
        cloud = present * smooth(0.38, 0.72, density) * (1.0 - smooth(0.025, 0.055, depth))
        body, line = jnp.maximum(body, cloud), jnp.where(cloud > body, smooth(-0.03, 0.045, depth), line)
    top, low = jnp.asarray(CLOUD_TOP)[time][:, None, None], jnp.asarray(CLOUD_LOW)[time][:, None, None]
    return over(picture, top + (low - top) * line[None], 0.95 * strength * body)


def hills(
    draws: Float[Array, "2"], picture: Picture, grid: Grid, time: Array, ground: Array, horizon: Array
) -> Picture:
    """One low distant ridge, hazy between the ground's colour and the sky's."""
    phase = np.pi * draws
    ridge = (
        0.035
        + 0.016 * jnp.sin(2 * np.pi * 1.1 * grid.x + phase[0])
        + 0.010 * jnp.sin(2 * np.pi * 2.3 * grid.x + phase[1])
    )
    near = jnp.asarray(GROUND_NEAR)[ground] * jnp.asarray(GROUND_LIGHT)[time]
    colour = 0.58 * near + 0.36 * jnp.asarray(SKY_LOW)[time]
    return over(picture, colour, fill(horizon - ridge - grid.y, grid.pixel))


def mountain(
    picture: Picture, grid: Grid, time: Array, horizon: Array, colour: Array, x: Array, height: Array, alpha: Array
) -> Picture:
    """A peak standing on the horizon at `x`, lit from the left, its right face in shade and its top under snow."""
    light = jnp.asarray(OBJECT_LIGHT)[time]
    haze, half_width = 0.12 * jnp.asarray(SKY_LOW)[time], 0.66 * height
    body, shade = (0.88 * table[colour] * light + haze for table in (jnp.asarray(BODY), jnp.asarray(SHADE)))
    dx, dy = (grid.x - x) / half_width, (grid.y - horizon + height) / height
    slope = jnp.sqrt(1.0 + (height / half_width) ** 2) / height
    inside = alpha * fill((jnp.sqrt(dx**2 + 0.004) - 0.063 - dy) / slope, grid.pixel)
    across = grid.pixel / half_width
    picture = over(picture, body, inside)
    picture = over(picture, shade, inside * fill(0.10 * jnp.sin(7.0 * dy) - 0.05 - dx, 2.0 * across) * 0.85)
    cap = fill(dy - 0.27 - 0.05 * jnp.cos(13.0 * dx), 1.5 * grid.pixel / height)
    snow = (0.97 - 0.20 * fill(0.10 * jnp.sin(7.0 * dy) - 0.05 - dx, 2.0 * across))[None] * light[:, None, None]
    return over(picture, snow, inside * cap)


def land(
    key: Array,
    draws: Float[Array, "2"],
    picture: Picture,
    grid: Grid,
    time: Array,
    ground: Array,
    horizon: Array,
    orb: Array,
    orb_x: Array,
) -> Picture:
    """The ground below the horizon: depth gradient, one rolling fold (ripples on the sea) and gentle texture."""
    noise_key, wave_key = jax.random.split(key)
    light = jnp.asarray(GROUND_LIGHT)[time]
    far, near = jnp.asarray(GROUND_FAR)[ground] * light, jnp.asarray(GROUND_NEAR)[ground] * light
    is_sea = (ground == 3).astype(jnp.float32)
    far = far + 0.35 * is_sea * (jnp.asarray(SKY_LOW)[time] - far)
    depth = jnp.clip((grid.y - horizon) / (1.0 - horizon), 0.0, 1.0)
    size = picture.shape[-1]
    phase = np.pi * draws
    fold = (
        horizon
        + 0.17
        + 0.03 * jnp.sin(2 * np.pi * 0.8 * grid.x + phase[0])
        + 0.012 * jnp.sin(2 * np.pi * 1.7 * grid.x + phase[1])
    )
    below = smooth(-0.004, 0.022, grid.y - fold) * (1.0 - jnp.clip((grid.y - fold) / 0.22, 0.0, 1.0))
    tone = 0.72 * depth - (1.0 - is_sea) * 0.34 * below
    ripple = (0.3 + 0.7 * depth) * value_noise(wave_key, 6, 4, size)
    tone = tone + 0.10 * is_sea * ripple
    colour = far[:, None, None] + (near - far)[:, None, None] * (tone + 0.08)[None]
    colour = colour * (1.0 + 0.012 * value_noise(noise_key, 5, 5, size))[None]
    gleam = jnp.exp(-0.5 * ((grid.x - orb_x) / (0.035 + 0.05 * depth)) ** 2) * (0.55 - 0.40 * depth)
    colour = over(colour, jnp.asarray(ORB)[time], orb * is_sea * gleam)
    return over(picture, colour, fill(horizon - grid.y, grid.pixel))


class Sprite(NamedTuple):
    """What the object painters need: local coordinates, local pixel width, and colours by column, lit."""

    u: Float[Array, "1 s"]
    v: Float[Array, "s s"]
    pixel: Float[Array, "1 s"]
    body: Float[Array, "3 1 s"]
    shade: Float[Array, "3 1 s"]
    light: Float[Array, "3"]
    is_night: Array

    def solid(self, distance: Map, rim: float = 0.5) -> Float[Array, "3 s s"]:
        """Body colour of a solid: lit from the upper left, darker within a soft rim along its edge."""
        dark = (
            jnp.clip(0.16 + 0.20 * self.u + 0.14 * self.v, 0.0, 0.5)
            + rim * jnp.clip(1.0 + distance / 0.16, 0.0, 1.0) ** 2
        )
        return self.body + (self.shade - self.body) * jnp.clip(dark, 0.0, 0.8)[None]


def house(p: Picture, s: Sprite, on: Map) -> Picture:
    """Walls in the body colour under a roof of its darker hue; the window is lit at night."""
    u, v = s.u, s.v
    p = over(p, s.shade, on * fill(box(u, v, (0.45, -0.62), (0.11, 0.3)), s.pixel))
    walls = box(u, v, (0.0, 0.42), (0.72, 0.58))
    p = over(p, s.solid(walls, 0.35), on * fill(walls, s.pixel))
    roof = trapezoid(u, v, -0.95, 0.0, 0.10, 0.92)
    p = over(p, 0.8 * s.shade + 0.2 * s.body, on * fill(roof, s.pixel))
    p = over(p, WOOD * s.light, on * fill(box(u, v, (-0.28, 0.66), (0.17, 0.34), 0.05), s.pixel))
    window = jnp.where(s.is_night, LAMP, GLASS * s.light)
    return over(p, window, on * fill(box(u, v, (0.31, 0.42), (0.2, 0.2), 0.03), s.pixel))


def tree(p: Picture, s: Sprite, on: Map) -> Picture:
    """A round crown of three lobes in the body colour on a wooden trunk."""
    u, v = s.u, s.v
    p = over(p, WOOD * s.light, on * fill(box(u, v, (0.0, 0.6), (0.12, 0.4), 0.04), s.pixel))
    lobes = jnp.minimum(circle(u, v, (-0.36, -0.02), 0.48), circle(u, v, (0.36, -0.02), 0.48))
    crown = jnp.minimum(lobes, circle(u, v, (0.0, -0.42), 0.56))
    return over(p, s.solid(crown, 0.45), on * fill(crown, s.pixel))


def car(p: Picture, s: Sprite, on: Map) -> Picture:
    """A car from the side: body and cabin in the body colour, windows, dark wheels."""
    u, v = s.u, s.v
    cabin = trapezoid(u + 0.06, v, -0.36, 0.30, 0.36, 0.66)
    body = jnp.minimum(box(u, v, (0.0, 0.42), (0.92, 0.30), 0.16), cabin)
    p = over(p, s.solid(body), on * fill(body, s.pixel))
    glass = jnp.maximum(trapezoid(u + 0.06, v, -0.22, 0.12, 0.30, 0.46), 0.05 - jnp.abs(u + 0.06))
    p = over(p, GLASS * s.light * jnp.where(s.is_night, 0.7, 1.0), on * fill(glass, s.pixel))
    for x in (-0.5, 0.5):
        hub = circle(u, v, (x, 0.73), 0.0)
        p = over(p, TYRE * s.light, on * fill(hub - 0.25, s.pixel))
        p = over(p, 0.72 * s.light, on * fill(hub - 0.10, s.pixel))
    return p


def boat(p: Picture, s: Sprite, on: Map) -> Picture:
    """A sailing boat: hull in the body colour, sails in a lighter tint of it."""
    u, v = s.u, s.v
    p = over(p, WOOD * s.light, on * fill(box(u, v, (-0.04, -0.2), (0.05, 0.75)), s.pixel))
    tint = 0.62 * s.body + 0.36 * (WHITE * s.light)[:, None, None]
    reach = (v + 0.92) / 1.2
    main = jnp.maximum(jnp.maximum(0.05 - u, v - 0.28), (u - 0.05 - 0.72 * reach) / 1.17)
    p = over(p, tint, on * fill(main, s.pixel))
    fore = jnp.maximum(jnp.maximum(u + 0.14, v - 0.28), (-u - 0.14 - 0.55 * (v + 0.7)) / 1.14)
    p = over(p, 0.75 * tint + 0.25 * s.shade, on * fill(fore, s.pixel))
    hull = trapezoid(u, v, 0.38, 0.88, 0.92, 0.62)
    return over(p, s.solid(hull, 0.4), on * fill(hull, s.pixel))


def balloon(p: Picture, s: Sprite, on: Map) -> Picture:
    """A hot-air balloon: striped envelope in the body colour and its tint, wooden basket."""
    u, v = s.u, s.v
    p = over(p, WOOD * s.light, on * 0.8 * fill(trapezoid(u, v, 0.4, 0.75, 0.26, 0.16), s.pixel))
    envelope = jnp.minimum(circle(u, v, (0.0, -0.27), 0.70), trapezoid(u, v, 0.05, 0.58, 0.615, 0.2))
    p = over(p, s.solid(envelope), on * fill(envelope, s.pixel))
    bulge = jnp.sqrt(jnp.clip(1.0 - ((v + 0.27) / 0.95) ** 2, 0.0, 1.0))
    stripe = 0.35 * fill(jnp.abs(u + 0.05) - 0.2 * bulge, s.pixel) * fill(envelope + 0.06, s.pixel)
    p = over(p, (WHITE * s.light)[:, None, None], on * stripe)
    return over(p, WOOD * s.light, on * fill(box(u, v, (0.0, 0.84), (0.18, 0.14), 0.04), s.pixel))


PAINTERS = {1: house, 2: tree, 3: car, 4: boat, 6: balloon}


def shadows(picture: Picture, s: Sprite, strength: Map) -> Picture:
    """A soft dark ellipse under each standing object."""
    distance = ((s.u - 0.06) / 0.98) ** 2 + ((s.v - 0.96) / 0.17) ** 2
    return picture * (1.0 - strength * (1.0 - smooth(0.15, 1.0, distance)))[None]
