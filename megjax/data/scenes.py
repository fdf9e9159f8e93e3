"""Procedural captioned landscapes: sampling with a held-out split, rendering, labels, captions and their parser."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from megjax.data import scene_shapes as shapes
from megjax.keys import threefry

TIMES = ("dawn", "day", "sunset", "night")
SKIES = ("clear", "cloudy", "orb")
GROUNDS = ("meadow", "desert", "snow", "sea")
KINDS = ("house", "tree", "car", "boat", "mountain", "balloon")
SLOT_KINDS = ("none", *KINDS)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "large")
PLACES = ("left", "centre", "right")
SPLITS = ("train", "held_out")

ATTRIBUTES: tuple[tuple[str, int], ...] = (
    ("time", len(TIMES)),
    ("sky", len(SKIES)),
    ("ground", len(GROUNDS)),
    *((f"{place}_{name}", count) for place in PLACES for name, count in (("kind", 7), ("colour", 7), ("size", 2))),
)


def _allowed() -> np.ndarray:
    table = np.ones((len(GROUNDS), len(SLOT_KINDS)), bool)
    at_sea = GROUNDS.index("sea")
    table[:, SLOT_KINDS.index("boat")] = False
    table[at_sea, [SLOT_KINDS.index(kind) for kind in ("house", "tree", "car")]] = False
    table[at_sea, SLOT_KINDS.index("boat")] = True
    return table


def _held_out() -> np.ndarray:
    kind, colour, place = np.indices((len(SLOT_KINDS), len(COLOURS), len(PLACES)))
    return (kind > 0) & ((kind + 2 * colour + 3 * place) % 9 == 4)


ALLOWED = _allowed()
"""[ground, kind]: which kinds (0 = none) stand on which ground."""
HELD_OUT = _held_out()
"""[kind, colour, place]: the ninth of the triples that training never sees; at most one in each row of any two axes."""


class Scene(NamedTuple):
    """What a picture shows. Slots run left, centre, right; kind 0 is an empty slot, whose colour and size are 0."""

    time: Int[Array, ""]
    sky: Int[Array, ""]
    ground: Int[Array, ""]
    kind: Int[Array, "3"]
    colour: Int[Array, "3"]
    size: Int[Array, "3"]


def is_held_out(scene: Scene) -> Bool[Array, ""]:
    """Whether any object of the scene is a held-out (kind, colour, place) triple."""
    return jnp.asarray(HELD_OUT)[scene.kind, scene.colour, jnp.arange(len(PLACES))].any()


def sample_scene(key: Array, split: str = "train") -> Scene:
    """Draws a scene with one to three objects.

    "train" scenes have no held-out triple; in "held_out" scenes one object, at a random occupied place, is held out and
    the others are free. Raises ValueError on any other `split`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    # One draw serves all choices: categories are floors of uniforms, orders and masked picks are their comparisons.
    triples = (len(PLACES), len(SLOT_KINDS), len(COLOURS))
    draws = jax.random.uniform(threefry(key), (10 + int(np.prod(triples)),), jnp.float32)
    time, sky, ground, count = (
        jnp.floor(draws[i] * num).astype(jnp.int32)
        for i, num in enumerate((len(TIMES), len(SKIES), len(GROUNDS), len(PLACES)))
    )
    order, size = draws[4:7], (draws[7:10] < 0.5).astype(jnp.int32)
    rank = (order[:, None] > order[None]).sum(axis=1)
    present = rank <= count

    held_out = jnp.asarray(np.moveaxis(HELD_OUT, 2, 0))
    possible = jnp.asarray(ALLOWED & (np.arange(len(SLOT_KINDS)) > 0))[ground][None, :, None]
    if split == "train":
        choices = possible & ~held_out
    else:
        choices = possible & (held_out | (rank > 0)[:, None, None])
    pick = jnp.where(choices, draws[10:].reshape(triples), -1.0).reshape(len(PLACES), -1).argmax(axis=1)
    kind, colour = pick // len(COLOURS), pick % len(COLOURS)
    kind, colour, size = (jnp.where(present, value, 0).astype(jnp.int32) for value in (kind, colour, size))
    return Scene(time=time, sky=sky, ground=ground, kind=kind, colour=colour, size=size)


def labels(scene: Scene) -> Int[Array, "12"]:
    """Class indices in the order of ATTRIBUTES."""
    slots = jnp.stack([scene.kind, scene.colour, scene.size], axis=-1).reshape(-1)
    return jnp.concatenate([jnp.stack([scene.time, scene.sky, scene.ground]), slots]).astype(jnp.int32)


def mentioned(scene: Scene) -> Bool[Array, "12"]:
    """Which of `labels` a caption states: all but those of empty slots."""
    return jnp.concatenate([jnp.ones(3, bool), jnp.repeat(scene.kind > 0, 3)])


def render(key: Array, scene: Scene, image_size: int = 64) -> Float[Array, "s s 3"]:
    """Renders a scene in [0, 1]; the key moves objects by up to 1.5/64, sizes by 6 %, and varies light and texture."""
    layout_key, ground_key = jax.random.split(threefry(key))
    grid = shapes.make_grid(image_size)
    draws = jax.random.uniform(layout_key, (47,), jnp.float32, -1.0, 1.0)
    jitter, frame, light, sky_draws = draws[:9].reshape(3, 3), draws[9:12], draws[12:14], draws[14:]
    is_cloudy, orb = ((scene.sky == SKIES.index(name)).astype(jnp.float32) for name in ("cloudy", "orb"))
    horizon = 0.575 + 0.02 * frame[0]
    orb_x = jnp.where(frame[1] > 0.0, 2.0 / 3.0, 1.0 / 3.0) + 0.03 * frame[2]
    slot_x = (np.arange(3, dtype=np.float32) + 0.5) / 3 + 1.5 / 64 * jitter[0]
    scale = jnp.where(scene.size == 1, 0.146, 0.087) * (1.0 + 0.06 * jitter[1])

    picture = shapes.sky(sky_draws[4:], grid, scene.time, horizon, is_cloudy, orb, orb_x)
    picture = shapes.hills(sky_draws[:2], picture, grid, scene.time, scene.ground, horizon)
    is_mountain = (scene.kind == SLOT_KINDS.index("mountain")).astype(jnp.float32)
    for place in range(len(PLACES)):
        picture = shapes.mountain(
            picture,
            grid,
            scene.time,
            horizon,
            scene.colour[place],
            slot_x[place],
            2.2 * scale[place],
            is_mountain[place],
        )
    picture = shapes.land(ground_key, sky_draws[2:4], picture, grid, scene.time, scene.ground, horizon, orb, orb_x)
    picture = _objects(picture, grid, scene, slot_x, scale, horizon, jitter[2])

    exposure = 1.0 + 0.05 * light[0]
    warmth = 0.02 * light[1] * jnp.array([1.0, 0.0, -1.0], jnp.float32)
    picture = picture * (exposure * (1.0 + warmth))[:, None, None]
    return jnp.clip(jnp.moveaxis(picture, 0, -1), 0.0, 1.0)


def _objects(
    picture: Array, grid: shapes.Grid, scene: Scene, slot_x: Array, scale: Array, horizon: Array, lift: Array
) -> Array:
    """Paints whatever stands or floats in the three slots, with each pixel column reading the attributes of its own."""
    column_slot = np.minimum((np.asarray(range(picture.shape[-1])) + 0.5) / picture.shape[-1] * 3, 2.99).astype(int)
    is_balloon = scene.kind == SLOT_KINDS.index("balloon")
    foot = horizon + 0.10 + 0.55 * scale + 0.02 * lift
    slot_y = jnp.where(is_balloon, 0.30 + 0.02 * lift, foot - scale)
    light = jnp.asarray(shapes.OBJECT_LIGHT)[scene.time]
    body, shade = ((jnp.asarray(table)[scene.colour] * light[None]).T for table in (shapes.BODY, shapes.SHADE))
    columns = jnp.concatenate([jnp.stack([slot_x, slot_y, scale]), body, shade])[:, None, column_slot]
    half = columns[2]
    sprite = shapes.Sprite(
        u=(grid.x - columns[0]) / half,
        v=(grid.y - columns[1]) / half,
        pixel=grid.pixel / half,
        body=columns[3:6],
        shade=columns[6:9],
        light=light,
        is_night=scene.time == TIMES.index("night"),
    )
    kind = scene.kind[column_slot][None]
    stands = (kind > 0) & (kind != SLOT_KINDS.index("balloon")) & (kind != SLOT_KINDS.index("mountain"))
    picture = shapes.shadows(picture, sprite, 0.3 * stands.astype(jnp.float32))
    for index, paint in shapes.PAINTERS.items():
        picture = paint(picture, sprite, (kind == index).astype(jnp.float32))
    return picture


_GROUND_PHRASES = ("in a meadow", "in a desert", "in the snow", "by the sea")
_GROUND_NOUNS = ("a meadow", "a desert", "a snow field", "the sea")
_DAYTIME = {"day": "daytime"}

_WORDS: dict[str, tuple[str, int]] = {
    **{word: ("time", i) for i, word in enumerate(TIMES)},
    **{word: ("sky", i) for i, word in enumerate(SKIES)},
    **{word: ("ground", i) for i, word in enumerate(GROUNDS)},
    **{word: ("kind", i) for i, word in enumerate(SLOT_KINDS) if i},
    **{word: ("colour", i) for i, word in enumerate(COLOURS)},
    **{word: ("size", i) for i, word in enumerate(SIZES)},
    **{word: ("place", i) for i, word in enumerate(PLACES)},
}
_SYNONYMS = {
    "dawn": "sunrise morning",
    "day": "daytime noon midday afternoon",
    "sunset": "dusk evening",
    "night": "nighttime midnight",
    "clear": "cloudless",
    "cloudy": "cloud clouds overcast",
    "orb": "sun moon",
    "meadow": "grass field grassland",
    "desert": "sand dunes",
    "snow": "snowy",
    "sea": "ocean water",
    "house": "houses cottage home",
    "tree": "trees",
    "car": "cars",
    "boat": "boats sailboat ship",
    "mountain": "mountains peak",
    "balloon": "balloons",
    "small": "little tiny",
    "large": "big huge",
    "left": "lefthand",
    "centre": "center middle",
    "right": "righthand",
}
_WORDS |= {synonym: _WORDS[word] for word, synonyms in _SYNONYMS.items() for synonym in synonyms.split()}
_BREAKS = re.compile(r"[,;:.]|\b(?:and|with|under|over|behind|beside|near|next)\b")


@dataclasses.dataclass(frozen=True)
class ParsedObject:
    """An object named in a caption; fields that the text leaves open are None."""

    kind: int
    colour: int | None = None
    size: int | None = None
    place: int | None = None


@dataclasses.dataclass(frozen=True)
class ParsedCaption:
    """What a caption states, as class indices; what it leaves open is None."""

    time: int | None
    sky: int | None
    ground: int | None
    objects: tuple[ParsedObject, ...]

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The stated labels and their mask, [12] int32 and bool as `labels` and `mentioned`; objects without a place
        are left out, and of two objects at one place the first counts."""
        values = [self.time, self.sky, self.ground]
        for place in range(len(PLACES)):
            here = next((item for item in self.objects if item.place == place), None)
            values += [None] * 3 if here is None else [here.kind, here.colour, here.size]
        known = np.array([value is not None for value in values])
        return np.array([value or 0 for value in values], np.int32), known


def caption(scene: Scene, phrasing: int) -> str:
    """States every attribute of one scene in lower-case English; `phrasing` is in [0, NUM_PHRASINGS)."""
    if not 0 <= phrasing < NUM_PHRASINGS:
        raise ValueError(f"phrasing must be in [0, {NUM_PHRASINGS}), got {phrasing}")
    time, sky, ground = (int(value) for value in (scene.time, scene.sky, scene.ground))
    slots = zip(*(np.asarray(value).tolist() for value in (scene.kind, scene.colour, scene.size)), PLACES, strict=True)
    items = [(SLOT_KINDS[kind], COLOURS[colour], SIZES[size], place) for kind, colour, size, place in slots if kind]
    return _PHRASINGS[phrasing](time, sky, ground, items)


def _join(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _at(place: str) -> str:
    return f"in the {place}" if place == "centre" else f"on the {place}"


def _an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _sky(time: int, sky: int) -> str:
    adjective = _DAYTIME.get(TIMES[time], TIMES[time])
    if SKIES[sky] == "orb":
        return f"a {adjective} sky with a {'moon' if TIMES[time] == 'night' else 'sun'}"
    return f"a {SKIES[sky]} {adjective} sky"


def _objects_first(time: int, sky: int, ground: int, items: list) -> str:
    named = _join([f"a {size} {colour} {kind} {_at(place)}" for kind, colour, size, place in items])
    return f"{named}, {_GROUND_PHRASES[ground]} under {_sky(time, sky)}"


def _sky_first(time: int, sky: int, ground: int, items: list) -> str:
    named = _join([f"{_at(place)} a {size} {colour} {kind}" for kind, colour, size, place in reversed(items)])
    return f"under {_sky(time, sky)}, {_GROUND_PHRASES[ground]}: {named}"


def _ground_first(time: int, sky: int, ground: int, items: list) -> str:
    weather = ("a clear sky", "clouds", "a moon" if TIMES[time] == "night" else "a sun")[sky]
    when = f"by {TIMES[time]}" if TIMES[time] in ("day", "night") else f"at {TIMES[time]}"
    named = ", ".join(f"{_an(colour)} {kind}, {size}, {_at(place)}" for kind, colour, size, place in items)
    return f"{_GROUND_NOUNS[ground]} {when} with {weather}: {named}"


def _described(time: int, sky: int, ground: int, items: list) -> str:
    named = _join([f"a {kind}, {size} and {colour}, {_at(place)}" for kind, colour, size, place in items])
    return f"{named}, {_GROUND_PHRASES[ground]}, {_sky(time, sky)}"


def _brief(time: int, sky: int, ground: int, items: list) -> str:
    named = ", ".join(f"{size} {colour} {kind} {place}" for kind, colour, size, place in items)
    return f"{_sky(time, sky)[2:]}, {GROUNDS[ground]}, {named}"


_PHRASINGS = (_objects_first, _sky_first, _ground_first, _described, _brief)
NUM_PHRASINGS = len(_PHRASINGS)

DEFAULT_PROMPTS = (
    "a large red house on the left and a small green tree in the centre, in a meadow under a cloudy dawn sky",
    "a small yellow boat on the left and a large white mountain on the right, by the sea under a night sky with a moon",
    "a large purple balloon in the centre and a small blue car on the right, in a desert under a sunset sky with a sun",
    "a large orange tree on the left and a small blue house on the right, in the snow under a clear daytime sky",
)


def parse_caption(text: str) -> ParsedCaption:
    """Reads back every phrasing of `caption`, and looser prompts such as "a red house under a night sky".

    Unknown words are ignored. Adjectives belong to the object of their clause or, in a clause without one, to the
    object before it; those beside a word for the sky or the ground (a green meadow) belong to no object.
    """
    scenery: dict[str, int] = {}
    objects: list[dict[str, int]] = []
    for clause in _BREAKS.split(text.lower()):
        found = [_WORDS[word] for word in re.findall(r"[a-z]+", clause) if word in _WORDS]
        for name, value in found:
            if name in ("time", "sky", "ground"):
                scenery.setdefault(name, value)
        if any(name in ("time", "sky", "ground") for name, _ in found):
            after = max((i for i, (name, _) in enumerate(found) if name == "kind"), default=len(found))
            found = found[:after] + [item for item in found[after:] if item[0] in ("kind", "place")]
            if not any(name == "kind" for name, _ in found):
                continue
        pending = sum(name == "kind" for name, _ in found)
        if pending:
            objects.append({})
        for name, value in found:
            if name == "kind" and pending > 1:
                pending -= 1
                objects[-1].setdefault(name, value)
                objects.append({})
            elif name in ("kind", "colour", "size", "place") and objects:
                objects[-1].setdefault(name, value)
    return ParsedCaption(
        *(scenery.get(name) for name in ("time", "sky", "ground")), tuple(ParsedObject(**o) for o in objects)
    )


def num_captions() -> int:
    """The number of distinct captions: all scenes of both splits, each in NUM_PHRASINGS wordings."""
    fillings = 1 + ALLOWED[:, 1:].sum(axis=1) * len(COLOURS) * len(SIZES)
    return int(len(TIMES) * len(SKIES) * (fillings ** len(PLACES) - 1).sum() * NUM_PHRASINGS)
