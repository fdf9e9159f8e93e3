"""Tests of caches of encoded images and of the captions of scenes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data import latents, scenes
from megjax.diffusion.pipeline import StableDiffusion

SIZE, SHARD = 8, 4
pytestmark = pytest.mark.usefixtures("fast_compile")


def test_each_device_takes_a_part():
    values = np.arange(6.0)
    placed = latents.over_devices(6)(values)
    np.testing.assert_array_equal(placed, values)
    assert placed.sharding.device_set == set(jax.local_devices())


def draw(key, batch):
    return jax.random.uniform(key, (batch, SIZE, SIZE, 3))


def test_encoded_images(model, calls, tmp_path):
    settings = {"source": "noise", "seed": 7, "shard_size": SHARD}
    z = latents.encode(model, draw, 6, tmp_path, **settings)
    assert z.shape == (6, SIZE, SIZE, 4) and calls == [SHARD] * 2
    keys = [jax.random.fold_in(jax.random.key(7), shard) for shard in range(2)]
    direct = np.concatenate([model.encode(draw(key, SHARD)) for key in keys])
    np.testing.assert_allclose(z, direct[:6], atol=1e-6 * np.abs(z).max())
    np.testing.assert_array_equal(latents.load(tmp_path)[:6], z)

    calls.clear()
    latents.shard_path(tmp_path, 0).unlink()
    np.testing.assert_array_equal(latents.encode(model, draw, 6, tmp_path, **settings), z)
    assert calls == [SHARD]
    np.testing.assert_array_equal(latents.encode(model, draw, 5, tmp_path, **settings), z[:5])
    np.testing.assert_array_equal(latents.encode(model, draw, 8, tmp_path, **settings)[:6], z)
    assert calls == [SHARD]
    np.testing.assert_array_equal(latents.encode(model, draw, 9, tmp_path, **settings)[:6], z)
    assert calls == [SHARD] * 2

    params = jax.tree.map(lambda x: x + np.float32(1), model.params)
    other = StableDiffusion(model.configs, model.graphs, params, model.tokenizer)
    cases = ((model, {"source": "art"}, "source"), (model, {"seed": 8}, "seed"), (other, {}, "model"))
    for pipe, changes, name in cases:
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            latents.encode(pipe, draw, 6, tmp_path, **settings | changes)
    with pytest.raises(ValueError, match="was made with another num_steps|was made with another guidance_scale"):
        latents.generate(model, ["a red house"], tmp_path, seed=7, num_steps=2, shard_size=SHARD)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num": 0}, "num is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"source": " "}, "source is ' '"),
        ({"draw": lambda key, batch: draw(key, batch + 1)}, r"shape is \(5, 8, 8, 4\); it must be \(4, h, w, c\)"),
        (
            {"draw": lambda key, batch: jnp.nan * draw(key, batch)},
            "images from smallest to largest is .nan, nan.; it must be in 0 to 1",
        ),
    ],
)
def test_bad_encoding_is_refused(model, tmp_path, changes, message):
    settings = {"draw": draw, "num": 6, "source": "noise", "shard_size": SHARD} | changes
    with pytest.raises(ValueError, match=message):
        latents.encode(model, folder=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_captions_depend_on_seed_and_index_only():
    captions = latents.scene_captions(40, seed=1)
    assert captions[:3] == latents.scene_captions(3, seed=1)
    assert captions != latents.scene_captions(40, seed=2)
    assert len(set(captions)) > 30
    assert captions != latents.scene_captions(40, seed=1, split="held_out")
    assert all(scenes.parse_caption(caption).objects for caption in captions)


def test_bad_captions_are_refused():
    for arguments, message in (((0,), "num is 0"), ((3, -1), "seed is -1"), ((3, 0, "test"), "split must be one of")):
        with pytest.raises(ValueError, match=message):
            latents.scene_captions(*arguments)
