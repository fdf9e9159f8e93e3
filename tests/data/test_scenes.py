"""Scenes: rendering, the held-out split, captions and their parser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data import scenes
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM = 3000
BATCH = 24
RENDER = jax.jit(jax.vmap(scenes.render))
LABELS, MENTIONED, IS_HELD_OUT = (
    jax.jit(jax.vmap(function)) for function in (scenes.labels, scenes.mentioned, scenes.is_held_out)
)


def draw(split: str, num: int = NUM, seed: int = 0) -> scenes.Scene:
    keys = jax.random.split(jax.random.key(seed), num)
    return jax.device_get(jax.jit(jax.vmap(lambda key: scenes.sample_scene(key, split)))(keys))


def on_host(batch: scenes.Scene) -> list[scenes.Scene]:
    batch = jax.tree.map(np.asarray, batch)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(len(batch.time))]


@pytest.fixture(scope="module")
def train() -> scenes.Scene:
    return draw("train")


@pytest.fixture(scope="module")
def held_out() -> scenes.Scene:
    return draw("held_out", seed=1)


@pytest.fixture(scope="module")
def pictures(train):
    some = jax.tree.map(lambda leaf: leaf[:BATCH], train)
    keys = jax.random.split(jax.random.key(2), BATCH)
    return keys, some, RENDER(jax.random.clone(keys), some)


@pytest.fixture(scope="module")
def described(train, held_out):
    """Scenes of both splits on the host, with their labels and masks."""
    batch = jax.tree.map(lambda a, b: np.concatenate([a[:200], b[:200]]), train, held_out)
    return on_host(batch), np.asarray(LABELS(batch)), np.asarray(MENTIONED(batch))


def test_render_shape_range_and_determinism(pictures):
    keys, some, images = pictures
    assert images.shape == (BATCH, 64, 64, 3) and images.dtype == jnp.float32
    assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0
    np.testing.assert_array_equal(images, RENDER(jax.random.clone(keys), some))
    assert float(images.std(axis=(1, 2)).min()) > 0.02


def test_vmap_agrees_with_the_loop(pictures):
    keys, some, images = pictures
    render = jax.jit(scenes.render)
    for i in range(4):
        one = render(jax.random.clone(keys[i]), jax.tree.map(lambda leaf, i=i: leaf[i], some))
        np.testing.assert_allclose(one, images[i], atol=1e-4)


@pytest.mark.slow
def test_render_is_resolution_independent(pictures):
    keys, some, images = pictures
    render_large = jax.jit(jax.vmap(functools.partial(scenes.render, image_size=128)))
    large = np.asarray(render_large(jax.random.clone(keys), some))
    pooled = large.reshape(BATCH, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    psnr_db = -10.0 * np.log10(np.mean((pooled - np.asarray(images)) ** 2, axis=(1, 2, 3)))
    assert psnr_db.min() > 36.0


def test_every_attribute_changes_the_picture():
    base = dict(time=1, sky=0, ground=0, kind=[1, 2, 5], colour=[0, 3, 6], size=[1, 0, 1])
    base = {name: np.asarray(value, np.int32) for name, value in base.items()}
    variants = [scenes.Scene(**base)]
    for name, num in (("time", 4), ("sky", 3), ("ground", 4), ("kind", 7), ("colour", 7), ("size", 2)):
        for value in range(num):
            changed = base[name].copy()
            changed[(0,) if changed.ndim else ()] = value
            if not np.array_equal(changed, base[name]):
                variants.append(scenes.Scene(**base | {name: changed}))
    variants += variants[-1:] * (BATCH - len(variants))
    keys = jnp.stack([jax.random.key(3)] * BATCH)
    images = np.asarray(RENDER(jax.random.clone(keys), jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)))
    assert np.abs(images[1:] - images[0]).max(axis=(1, 2, 3)).min() > 0.2


def test_held_out_table_spares_every_pair():
    table = scenes.HELD_OUT[1:]
    assert table.sum() == 14 and not scenes.HELD_OUT[0].any()
    assert all(table.sum(axis=axis).max() == 1 for axis in range(3))
    for axes in ((1, 2), (0, 2), (0, 1)):
        count = table.sum(axis=axes)
        assert count.max() - count.min() <= 1
    for ground, place in itertools.product(range(4), range(3)):
        assert (scenes.ALLOWED[ground, 1:, None] & table[:, :, place]).any()


def test_split_rule(train, held_out):
    assert not IS_HELD_OUT(train).any()
    assert IS_HELD_OUT(held_out).all()


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_samples_follow_the_tables(split, train, held_out):
    batch = jax.tree.map(np.asarray, train if split == "train" else held_out)
    present = batch.kind > 0
    assert set(present.sum(axis=1)) == {1, 2, 3}
    assert scenes.ALLOWED[batch.ground[:, None], batch.kind][present].all()
    assert not batch.colour[~present].any() and not batch.size[~present].any()
    for values, num in ((batch.time, 4), (batch.sky, 3), (batch.ground, 4)):
        share = np.bincount(values, minlength=num) / NUM
        assert np.abs(share - 1 / num).max() < 4.5 * np.sqrt((1 - 1 / num) / num / NUM)


def test_training_covers_every_pair(train):
    kind, colour = np.asarray(train.kind), np.asarray(train.colour)
    place = np.broadcast_to(np.arange(3), kind.shape)
    seen = np.zeros((7, 7, 3), bool)
    seen[kind, colour, place] = True
    seen = seen[1:]
    assert all(seen.any(axis=axis).all() for axis in range(3))
    np.testing.assert_array_equal(seen, ~scenes.HELD_OUT[1:])


def test_unknown_split_raises():
    with pytest.raises(ValueError, match=r"split must be one of .*got 'test'"):
        scenes.sample_scene(jax.random.key(0), "test")


def test_labels_follow_attributes(train):
    values = np.asarray(LABELS(train))
    assert values.shape == (NUM, 12) and values.dtype == np.int32
    assert [name for name, _ in scenes.ATTRIBUTES][:5] == ["time", "sky", "ground", "left_kind", "left_colour"]
    np.testing.assert_array_equal(values.max(axis=0) + 1, [num for _, num in scenes.ATTRIBUTES])
    np.testing.assert_array_equal(values[:, 6:9], np.stack([train.kind, train.colour, train.size], -1)[:, 1])


@pytest.mark.parametrize("phrasing", range(scenes.NUM_PHRASINGS))
def test_captions_parse_back(phrasing, described):
    for scene, values, known in zip(*described, strict=True):
        text = scenes.caption(scene, phrasing)
        parsed, stated = scenes.parse_caption(text).labels()
        assert np.array_equal(parsed, values) and np.array_equal(stated, known), text
        assert len(text.split()) <= 34 and text == text.lower()


def test_phrasings_differ(described):
    for scene in described[0][:50]:
        assert len({scenes.caption(scene, p) for p in range(scenes.NUM_PHRASINGS)}) == scenes.NUM_PHRASINGS
    with pytest.raises(ValueError, match=r"phrasing must be in \[0, 5\), got 5"):
        scenes.caption(scene, 5)


def test_loose_prompts():
    house = scenes.ParsedObject(kind=1, colour=0)
    assert scenes.parse_caption("a red house under a night sky") == scenes.ParsedCaption(3, None, None, (house,))
    parsed = scenes.parse_caption("A tiny boat, white, near an orange peak on the left in the blue ocean at dusk!")
    boat, peak = scenes.ParsedObject(4, 6, 0, None), scenes.ParsedObject(5, 1, None, 0)
    assert parsed == scenes.ParsedCaption(2, None, 3, (boat, peak))
    values, known = parsed.labels()
    assert known.tolist() == [True, False, True, True, True] + [False] * 7
    assert values[3:5].tolist() == [5, 1]
    assert scenes.parse_caption("an astronaut") == scenes.ParsedCaption(None, None, None, ())


def test_num_captions_by_hand():
    on_land = 4 * 3 * 3 * ((1 + 5 * 14) ** 3 - 1)
    at_sea = 4 * 3 * ((1 + 3 * 14) ** 3 - 1)
    assert scenes.num_captions() == (on_land + at_sea) * scenes.NUM_PHRASINGS > 100_000


def test_default_prompts_are_captions():
    for text in scenes.DEFAULT_PROMPTS:
        values, _ = scenes.parse_caption(text).labels()
        slots = values[3:].reshape(3, 3).T
        assert scenes.caption(scenes.Scene(*values[:3], *slots), 0) == text


def test_products_are_exact():
    def draw_one(key):
        return scenes.render(key, scenes.sample_scene(jax.random.clone(key)))

    assert inexact_products(draw_one, jax.random.key(0)) == []
