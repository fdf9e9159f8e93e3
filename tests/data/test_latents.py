"""Tests of latent caches: their content, resuming and extending them, and what is refused."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from megjax import files
from megjax.data import latents
from megjax.diffusion.pipeline import StableDiffusion

SIZE, SHARD = 8, 4
COLOURS = ("red", "green", "blue", "white", "black", "pink", "grey", "brown", "gold")
PROMPTS = [f"a {colour} house" for colour in COLOURS]
SETTINGS = {"seed": 3, "num_steps": 2, "guidance_scale": 3.0, "shard_size": SHARD}
pytestmark = pytest.mark.usefixtures("fast_compile")


def with_params(model, change):
    """`model` with `change` of its parameters, running the programs that `model` has compiled."""
    params = jax.tree.map(lambda x: change(np.asarray(x)), model.params)
    other = StableDiffusion(model.configs, model.graphs, params, model.tokenizer)
    other._latents, other._encode = model._latents, model._encode
    return other


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
        "sampler": '["ddim", 1]',
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
    left = path.with_name(path.name + ".1-0.part")
    left.write_bytes(b"half a shard")
    np.testing.assert_array_equal(latents.generate(model, PROMPTS, cache, **SETTINGS), cached[1])
    assert calls == [SHARD]
    assert sorted(contents(cache)) == sorted([*contents(cached[0]), left.name])
    left.unlink()
    np.testing.assert_array_equal(latents.load(cache), latents.load(cached[0]))


def test_a_kill_leaves_no_half_shard(model, cached, calls, monkeypatch, tmp_path):
    def kill(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            latents.generate(model, PROMPTS[:8], tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []
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

    def fail(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(ValueError, match="latents-000000.safetensors cannot be written: "):
        latents.generate(model, PROMPTS, tmp_path, **SETTINGS)


def test_another_model_is_found_out(model, cached, calls):
    other = with_params(model, lambda x: x + np.float32(1e-6))
    with pytest.raises(ValueError, match="latents-000000.safetensors was made with another model; choose"):
        latents.generate(other, PROMPTS, cached[0], **SETTINGS)
    assert calls == []


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"num_steps": 3}, {"guidance_scale": 2.0}, {"sampler": "euler"}, {"shard_size": 3}]
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
        return "arrays is .'values'.; it must be latents"
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
    return "is not a whole safetensors file .*; delete it to make it anew"


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
