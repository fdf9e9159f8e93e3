"""Tests of latent caches: their content, resuming and extending them, and what is refused."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megjax.data import latents, scenes
from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.generation import Graphs
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.pipeline import Configs, StableDiffusion
from megjax.diffusion.schedules import SchedulerConfig
from megjax.diffusion.tokenization import train_tokenizer
from megjax.diffusion.unet import UNet2DConditionModel, UNetConfig
from megjax.diffusion.vae import AutoencoderKL, VAEConfig

LIMIT, SIZE, SHARD = 12, 8, 4
COLOURS = ("red", "green", "blue", "white", "black", "pink", "grey", "brown", "gold")
PROMPTS = [f"a {colour} house" for colour in COLOURS]
SETTINGS = {"seed": 3, "num_steps": 2, "guidance_scale": 3.0, "shard_size": SHARD}


@pytest.fixture(scope="module", autouse=True)
def fast_compile():
    """Tiny models compile longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(make, rng):
    """Graph and parameters of `make()`, standard deviation the inverse root of the fan-in."""
    graph, abstract = nnx.split(nnx.eval_shape(make))

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    return graph, jax.tree.map(fill, abstract)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The smallest of models, with random weights."""
    tokens = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(PROMPTS * 5, tokens, vocab_size=600, max_tokens=LIMIT)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
    )
    unet = UNetConfig(
        sample_size=SIZE,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
    scheduler = SchedulerConfig("ddim", beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    rng = np.random.default_rng(0)
    parts = {
        "text_encoder": random_params(lambda: CLIPTextModel(text, rngs=ShapeRngs()), rng),
        "unet": random_params(lambda: UNet2DConditionModel(unet, rngs=ShapeRngs()), rng),
        "vae": random_params(lambda: AutoencoderKL(vae, rngs=ShapeRngs()), rng),
    }
    graphs = Graphs(**{name: pair[0] for name, pair in parts.items()}, scaling_factor=vae.scaling_factor)
    params = {name: pair[1] for name, pair in parts.items()}
    return StableDiffusion(Configs(text, unet, vae, scheduler), graphs, params, tokenizer)


def with_params(model, change):
    """`model` with `change` of its parameters, running the programs that `model` has compiled."""
    params = jax.tree.map(lambda x: change(np.asarray(x)), model.params)
    other = StableDiffusion(model.configs, model.graphs, params, model.tokenizer)
    other._latents, other._encode = model._latents, model._encode
    return other


@pytest.fixture
def calls(model, monkeypatch):
    """The number of latents that each call of any model has made in this test."""
    made = []

    def count(function):
        def counted(self, *arguments, **options):
            results = function(self, *arguments, **options)
            made.append(len(results))
            return results

        return counted

    for name in ("generate_latents", "encode"):
        monkeypatch.setattr(StableDiffusion, name, count(getattr(StableDiffusion, name)))
    return made


@pytest.fixture(scope="module")
def cached(model, tmp_path_factory):
    """Folder of a cache of all prompts, three shards, and what `generate` returned; not to be changed."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, latents.generate(model, PROMPTS, folder, **SETTINGS)


@pytest.fixture
def cache(cached, tmp_path):
    """A copy of that folder, to damage."""
    for path in cached[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(path, change, **identity):
    """Store `change` of a shard's latents, with `identity` in its metadata."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file({"latents": change(load_file(path)["latents"])}, path, metadata=metadata | identity)


def poison(values):
    values = values.copy()
    values[1, 2, 3, 0] = np.nan
    return values


def test_content_is_that_of_direct_calls(model, cached):
    folder, z = cached
    assert z.shape == (len(PROMPTS), SIZE, SIZE, 4) and z.dtype == np.float32
    filled = [*PROMPTS, *[PROMPTS[-1]] * 3]
    for shard in range(3):
        rows = slice(shard * SHARD, (shard + 1) * SHARD)
        key = jax.random.fold_in(jax.random.key(3), shard)
        direct = model.generate_latents(key, model.tokenize(filled[rows]), num_steps=2, guidance_scale=3.0)
        np.testing.assert_array_equal(z[rows], direct[: len(z[rows])])
        np.testing.assert_array_equal(latents.load(folder)[rows], direct)
    assert len({row.tobytes() for row in z}) == len(PROMPTS)


def test_identity_of_a_shard(model, cached):
    expected = {
        "model": latents.model_digest(model),
        "shard_size": "4",
        "seed": "3",
        "num_steps": "2",
        "guidance_scale": "3.0",
        "sampler": "null",
        "prompts": hashlib.sha256(json.dumps(PROMPTS[4:8]).encode()).hexdigest(),
    }
    assert latents.read_identity(latents.shard_path(cached[0], 1)) == expected


def test_a_whole_cache_is_read_without_the_model(model, cached, calls):
    folder, z = cached
    before = contents(folder)
    np.testing.assert_array_equal(latents.generate(model, tuple(PROMPTS), folder, **SETTINGS), z)
    np.testing.assert_array_equal(latents.generate(model, PROMPTS[:8], folder, **SETTINGS), z[:8])
    assert calls == [] and contents(folder) == before
    assert sorted(before) == [latents.shard_path(folder, shard).name for shard in range(3)]


def test_a_missing_shard_is_made_again_bit_for_bit(model, cache, cached, calls):
    path = latents.shard_path(cache, 1)
    path.unlink()
    path.with_suffix(".part").write_bytes(b"half a shard")
    np.testing.assert_array_equal(latents.generate(model, PROMPTS, cache, **SETTINGS), cached[1])
    assert calls == [SHARD]
    assert sorted(contents(cache)) == sorted(contents(cached[0]))
    np.testing.assert_array_equal(latents.load(cache), latents.load(cached[0]))


def test_a_kill_leaves_no_half_shard(model, cached, calls, monkeypatch, tmp_path):
    def kill(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            latents.generate(model, PROMPTS[:8], tmp_path, **SETTINGS)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    np.testing.assert_array_equal(latents.generate(model, PROMPTS[:8], tmp_path, **SETTINGS), cached[1][:8])
    assert calls == [SHARD] * 3


def test_more_prompts_extend_a_cache_and_remake_a_filled_up_shard(model, cached, calls, tmp_path):
    made = {}
    for num, expected in ((1, 1), (3, 1), (4, 1), (6, 1), (7, 1), (9, 2), (9, 0)):
        calls.clear()
        z = latents.generate(model, PROMPTS[:num], tmp_path, **SETTINGS)
        np.testing.assert_array_equal(z, cached[1][:num])
        assert len(calls) == expected
        made[num] = len(list(tmp_path.iterdir()))
    assert made == {1: 1, 3: 1, 4: 1, 6: 2, 7: 2, 9: 3}


@pytest.mark.parametrize(
    "prompts, changes, names",
    [
        ([*PROMPTS[:4], "a ship", *PROMPTS[5:]], {}, "prompts"),
        ([*PROMPTS[:4], PROMPTS[4], "a ship"], {}, "prompts"),
        (PROMPTS[:5], {}, "prompts"),
        (PROMPTS, {"num_steps": 3}, "num_steps, prompts"),
    ],
    ids=["first of the filled up", "last of the filled up", "fewer", "other settings"],
)
def test_a_filled_up_shard_of_other_prompts_is_kept(model, cached, calls, tmp_path, prompts, changes, names):
    path = latents.shard_path(tmp_path, 1)
    latents.generate(model, PROMPTS[:6], tmp_path, **SETTINGS)
    if names != "prompts":
        latents.shard_path(tmp_path, 0).unlink()
    before = contents(tmp_path)
    calls.clear()
    with pytest.raises(ValueError) as caught:
        latents.generate(model, prompts, tmp_path, **SETTINGS | changes)
    assert str(caught.value) == f"{path} was made with another {names}; choose another folder or delete this one"
    assert calls == [] and contents(tmp_path) == before


def test_a_whole_shard_that_ends_in_one_prompt_is_no_filled_up_one(model, calls, tmp_path):
    latents.generate(model, [*PROMPTS[:2], *[PROMPTS[1]] * 2, *PROMPTS[4:6]], tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="latents-000000.safetensors was made with another prompts"):
        latents.generate(model, PROMPTS[:6], tmp_path, **SETTINGS)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([], {}, r"prompts is \[\]; it must be a list of at least one"),
        ("a red house", {}, "prompts is 'a red house'; it must be a list"),
        (PROMPTS, {"shard_size": 0}, "shard_size is 0"),
        (PROMPTS, {"num_steps": 0}, "num_steps is 0"),
        (PROMPTS, {"num_steps": 5000}, "num_steps"),
        (PROMPTS, {"sampler": "magic"}, "sampler is 'magic'"),
        (PROMPTS, {"guidance_scale": float("nan")}, "guidance_scale is nan; it must be finite"),
        (PROMPTS, {"guidance_scale": float("inf")}, "guidance_scale is inf"),
        (PROMPTS, {"seed": -1}, "seed is -1; it must be an integer of at least 0 and at most 4294967295"),
        (PROMPTS, {"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_settings_are_refused_before_any_work(model, calls, tmp_path, prompts, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        latents.generate(model, prompts, tmp_path / "new", **SETTINGS | changes)
    assert "\n" not in str(caught.value)
    assert calls == [] and not (tmp_path / "new").exists()


def test_an_empty_prompt_is_an_unconditional_image(model, tmp_path):
    z = latents.generate(model, [""], tmp_path, **SETTINGS)
    key, ids = jax.random.fold_in(jax.random.key(3), 0), model.tokenize([""] * SHARD)
    direct = model.generate_latents(key, ids, num_steps=2, guidance_scale=7.0)  # any scale gives the same
    np.testing.assert_allclose(z, direct[:1], atol=1e-4 * np.abs(z).max())


def test_a_folder_that_cannot_be_used_is_refused(model, calls, cached, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match=f"folder is '{folder}' .*; it must be one that can be made"):
            latents.generate(model, PROMPTS, folder, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(latents.os, "access", lambda folder, mode: not mode & latents.os.W_OK)
        with pytest.raises(ValueError, match=f"folder is '{tmp_path}'; it must be writable"):
            latents.generate(model, PROMPTS, tmp_path, **SETTINGS)
        np.testing.assert_array_equal(latents.generate(model, PROMPTS, cached[0], **SETTINGS), cached[1])
        patch.setattr(latents.os, "access", lambda folder, mode: False)
        with pytest.raises(ValueError, match="it must be readable"):
            latents.generate(model, PROMPTS, tmp_path, **SETTINGS)
    assert calls == []
    (tmp_path / "latents-000000.part").mkdir()
    with pytest.raises(ValueError, match="latents-000000.safetensors cannot be written: "):
        latents.generate(model, PROMPTS, tmp_path, **SETTINGS)


def test_another_model_is_found_out(model, cached, calls):
    other = with_params(model, lambda x: x + np.float32(1e-6))
    with pytest.raises(ValueError, match="latents-000000.safetensors was made with another model; choose"):
        latents.generate(other, PROMPTS, cached[0], **SETTINGS)
    assert calls == []


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"num_steps": 3}, {"guidance_scale": 2.0}, {"sampler": "ddim"}, {"shard_size": 3}]
)
def test_other_settings_are_named(model, cached, calls, changes):
    names = "prompts, shard_size" if "shard_size" in changes else next(iter(changes))
    with pytest.raises(ValueError, match=f"was made with another {names}; choose another folder"):
        latents.generate(model, PROMPTS, cached[0], **SETTINGS | changes)
    assert calls == []


def damage(kind, path):
    """Damage a shard; the message that this must give."""
    if kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind in ("cut", "empty"):
        path.write_bytes(b"" if kind == "empty" else path.read_bytes()[:-8])
    elif kind == "foreign":
        save_file({"latents": np.zeros((SHARD, SIZE, SIZE, 4), np.float32)}, path)
        return "format is None; it must be 'megjax latents 1'"
    elif kind == "renamed":
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        save_file({"values": load_file(path)["latents"]}, path, metadata=metadata)
    else:
        changes = {
            "half": (lambda z: z.astype(np.float16), "dtype is 'float16'; it must be float32"),
            "flat": (lambda z: z.reshape(SHARD, -1), "it must be .b h w c."),
            "short": (lambda z: z[:-1], r"shape is \(3, 8, 8, 4\); it must be \(4, 8, 8, 4\)"),
            "small": (lambda z: z[:, 1:], r"shape is \(4, 7, 8, 4\); it must be \(4, 8, 8, 4\)"),
            "poisoned": (poison, "values that are NaN or infinite is 1"),
        }
        change, message = changes[kind]
        rewrite(path, change)
        return message
    return "is damaged .*; delete it to make it anew"


@pytest.mark.parametrize(
    "kind", ["cut", "empty", "a folder", "foreign", "renamed", "half", "flat", "short", "small", "poisoned"]
)
def test_a_bad_shard_is_refused_before_any_work(model, cache, calls, kind):
    latents.shard_path(cache, 2).unlink()
    path = latents.shard_path(cache, 1)
    message = damage(kind, path)
    for use in (lambda: latents.generate(model, PROMPTS, cache, **SETTINGS), lambda: latents.load(cache)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert calls == [] and not latents.shard_path(cache, 2).exists()


def test_an_unsound_model_stores_nothing(model, tmp_path):
    unsound = with_params(model, lambda x: x * np.float32(np.nan))
    with pytest.raises(ValueError, match="NaN or infinite is 1024; it must be none; is the model sound?"):
        latents.generate(unsound, PROMPTS, tmp_path, **SETTINGS)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "change, message",
    [(poison, "NaN or infinite is 1"), (lambda z: z[:, 1:], r"shape is \(4, 7, 8, 4\)"), (lambda z: z[1:], "shape")],
)
def test_shards_made_before_a_bad_one_stay(model, cached, monkeypatch, tmp_path, change, message):
    original, made = model.generate_latents, []

    def fails_second(*arguments, **options):
        made.append(np.asarray(original(*arguments, **options)))
        return jnp.asarray(change(made[-1]) if len(made) == 2 else made[-1])

    monkeypatch.setattr(model, "generate_latents", fails_second)
    with pytest.raises(ValueError, match=f"latents-000001.safetensors: .*{message}"):
        latents.generate(model, PROMPTS, tmp_path, **SETTINGS)
    assert list(contents(tmp_path)) == ["latents-000000.safetensors"]
    np.testing.assert_array_equal(latents.generate(model, PROMPTS, tmp_path, **SETTINGS), cached[1])
    assert len(made) == 4


def test_load_refuses_gaps_and_mixtures(cache, cached):
    np.testing.assert_array_equal(latents.load(cache)[: len(PROMPTS)], cached[1])
    rewrite(latents.shard_path(cache, 2), np.asarray, model="another", seed="5")
    with pytest.raises(ValueError, match="latents-000002.safetensors was made with another model, seed"):
        latents.load(cache)
    latents.shard_path(cache, 1).unlink()
    with pytest.raises(ValueError, match="lacks latents-000001.safetensors"):
        latents.load(cache)
    for nothing in (cache / "absent", cache / "latents-000000.safetensors"):
        with pytest.raises(ValueError, match="one that holds latents-*"):
            latents.load(nothing)


def test_a_saved_model_is_the_same_model(model, cached, calls, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = StableDiffusion.from_pretrained(tmp_path)
    assert latents.model_digest(loaded) == latents.model_digest(model)
    np.testing.assert_array_equal(latents.generate(loaded, PROMPTS, cached[0], **SETTINGS), cached[1])
    assert calls == []


def test_the_digest_depends_on_every_tensor_and_on_the_schedule(model):
    leaves, tree = jax.tree.flatten(model.params)
    digests = {latents.model_digest(model)}
    for i in range(0, len(leaves), 10):
        changed = jax.tree.unflatten(tree, [leaf + 1 if i == j else leaf for j, leaf in enumerate(leaves)])
        digests.add(latents.model_digest(StableDiffusion(model.configs, model.graphs, changed, model.tokenizer)))
    scheduler = dataclasses.replace(model.configs.scheduler, prediction_type="v_prediction")
    configs = dataclasses.replace(model.configs, scheduler=scheduler)
    digests.add(latents.model_digest(StableDiffusion(configs, model.graphs, model.params, model.tokenizer)))
    assert len(digests) == 2 + len(range(0, len(leaves), 10))


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

    other = with_params(model, lambda x: x + np.float32(1))
    cases = ((model, {"source": "art"}, "source"), (model, {"seed": 8}, "seed"), (other, {}, "model"))
    for pipe, changes, name in cases:
        with pytest.raises(ValueError, match=f"was made with another {name};"):
            latents.encode(pipe, draw, 6, tmp_path, **settings | changes)
    with pytest.raises(ValueError, match="was made with another num_steps|was made with another guidance_scale"):
        latents.generate(model, PROMPTS, tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num": 0}, "num is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"source": " "}, "source is ' '"),
        ({"draw": lambda key, batch: draw(key, batch + 1)}, r"shape is \(5, 8, 8, 4\); it must be \(4, h, w, c\)"),
        ({"draw": lambda key, batch: jnp.nan * draw(key, batch)}, "NaN or infinite is 1024"),
    ],
)
def test_bad_encoding_is_refused(model, tmp_path, changes, message):
    settings = {"draw": draw, "num": 6, "source": "noise", "shard_size": SHARD} | changes
    with pytest.raises(ValueError, match=message):
        latents.encode(model, folder=tmp_path, **settings)
    assert contents(tmp_path) == {}


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
