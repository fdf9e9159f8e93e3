"""Tests of SceneNet: shapes, learning, masked attributes, accuracies, and strict loading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from megjax.metrics import SceneNet, SceneNetConfig, scenenet
from megjax.precision import promoting

pytestmark = pytest.mark.usefixtures("fast_compile")
TINY = SceneNetConfig(image_size=32, widths=(8, 8, 8, 8), num_classes=(4, 3, 4, 3, 5, 2), feature_dim=16, num_groups=4)


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: SceneNet(TINY, nnx.Rngs(0)))()


@nnx.jit
def evaluate(model, images):
    """Features, logits, features alone and predictions of eight images."""
    return *model(images), model.features(images), scenenet.predict(model, images)


def images_and_labels():
    rng = np.random.default_rng(1)
    labels = [rng.integers(0, n, 8) for n in TINY.num_classes]
    return jnp.asarray(rng.uniform(size=(8, 32, 32, 3)), jnp.float32), jnp.asarray(np.stack(labels, axis=-1), jnp.int32)


def test_shapes(model):
    images, _ = images_and_labels()
    features, logits, alone, predicted = evaluate(model, images)
    assert features.shape == (8, 16) and features.dtype == jnp.float32
    assert tuple(scores.shape for scores in logits) == tuple((8, n) for n in TINY.num_classes)
    np.testing.assert_allclose(alone, features, rtol=1e-6)
    assert predicted.shape == (8, 6) and predicted.dtype == jnp.int32
    with pytest.raises(ValueError, match="images has shape"):
        model(images[:, :16])


def test_default_size_has_twelve_attributes_and_few_parameters():
    model = nnx.eval_shape(lambda: SceneNet(SceneNetConfig(), nnx.Rngs(0)))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) < 600_000


def test_sees_where_an_object_stands(model):
    canvas = np.zeros((8, 32, 32, 3), np.float32)
    canvas[0, 12:20, 0:8] = canvas[1, 12:20, 24:32] = 1
    left, right = np.asarray(evaluate(model, canvas)[0])[:2]
    assert np.linalg.norm(left - right) > 0.1 * np.linalg.norm(left)


def test_learns(model):
    images, labels = images_and_labels()
    mask = scenenet.slot_mask(labels)
    graph, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(lambda p: scenenet.loss(nnx.merge(graph, p)(images)[1], labels, mask))(params)
        updates, opt_state = promoting(optimizer.update)(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, grads

    losses, opt_state = [], jax.jit(optimizer.init)(params)
    for _ in range(40):
        params, opt_state, value, grads = step(params, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert all(np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))
    predicted = evaluate(nnx.merge(graph, params), images)[3]
    fitted = scenenet.attribute_accuracy(predicted, labels, mask)
    assert np.nanmean(fitted) > 0.9


def test_loss_by_hand_and_masked_slots_have_no_gradient():
    labels = np.array([[0, 1, 2, 0, 4, 1], [3, 0, 0, 2, 3, 0]])  # the first place is empty in the first image

    @jax.jit
    def run(logits, labels):
        mask = scenenet.slot_mask(labels)
        return mask, *jax.value_and_grad(scenenet.loss)(logits, labels, mask)

    mask, loss, gradients = run(tuple(np.zeros((2, n), np.float32) for n in TINY.num_classes), labels)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    uniform = (2 * np.log([4, 3, 4, 3]).sum() + np.log([5, 2]).sum()) / 10
    np.testing.assert_allclose(loss, uniform, rtol=1e-6)
    for i, gradient in enumerate(gradients):
        np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=1), mask[:, i])


def test_accuracies_by_hand():
    labels = np.array([[0, 1, 2, 0, 0, 0], [3, 0, 0, 2, 3, 0]])
    logits = tuple(np.eye(n, dtype=np.float32)[labels[:, i]] for i, n in enumerate(TINY.num_classes))
    predicted = np.array(jax.jit(scenenet.labels_from_logits)(logits))
    np.testing.assert_array_equal(predicted, [[0, 1, 2, 0, -1, -1], [3, 0, 0, 2, 3, 0]])
    predicted[1, 3] = 1

    @jax.jit
    def run(predicted, labels, mentioned):
        accuracy = scenenet.attribute_accuracy(predicted, labels, scenenet.slot_mask(labels))
        return accuracy, scenenet.caption_accuracy(predicted, labels, mentioned)

    mentioned = np.array([[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]], bool)
    accuracy, (per_image, right, total) = run(predicted, labels, mentioned)
    np.testing.assert_allclose(accuracy, [1, 1, 1, 0.5, 1, 1])
    np.testing.assert_allclose(per_image, [1, 2 / 3], rtol=1e-6)
    assert (int(right), int(total)) == (4, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3)])
def test_save_and_load(model, tmp_path, dtype, tolerance):
    images, _ = images_and_labels()
    model.save(tmp_path, dtype)
    loaded = SceneNet.load(tmp_path)
    assert loaded.config == TINY
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(loaded, nnx.Param)))
    features = np.asarray(evaluate(model, images)[0])
    np.testing.assert_allclose(evaluate(loaded, images)[0], features, atol=4 * tolerance * np.max(features))
    assert load_file(tmp_path / "model.safetensors")["dense.weight"].dtype == dtype


def test_loading_lists_every_mismatch(model, tmp_path):
    model.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stray"] = tensors.pop("head.bias")
    tensors["dense.weight"] = np.zeros((3, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        SceneNet.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("missing head.bias", "extra stray", "dense.weight has shape (3, 2), expected (16, 32)"):
        assert part in message


def test_loading_reports_broken_files(model, tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        SceneNet.load(tmp_path / "nowhere")
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        SceneNet.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"depth": 3}))
    with pytest.raises(ValueError, match="depth"):
        SceneNet.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", 40), ("widths", (8, 8, 9, 8)), ("num_classes", (4, 3)), ("num_classes", (4, 3, 4, 2))],
)
def test_bad_configuration(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        SceneNetConfig(**{name: value})


def test_bad_storage_dtype(model, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        model.save(tmp_path, "int8")
