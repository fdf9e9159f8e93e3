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

TINY = SceneNetConfig(image_size=32, widths=(8, 8, 8, 8), num_classes=(4, 3, 4, 3, 5, 2), feature_dim=16, num_groups=4)


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: SceneNet(TINY, nnx.Rngs(0)))()


def images_and_labels(num=8):
    image_key, label_key = jax.random.split(jax.random.key(1))
    keys = jax.random.split(label_key, len(TINY.num_classes))
    labels = [jax.random.randint(key, (num,), 0, n) for key, n in zip(keys, TINY.num_classes, strict=True)]
    return jax.random.uniform(image_key, (num, 32, 32, 3)), jnp.stack(labels, axis=-1)


def test_shapes(model):
    images, _ = images_and_labels(3)
    features, logits = model(images)
    assert features.shape == (3, 16) and features.dtype == jnp.float32
    assert tuple(scores.shape for scores in logits) == tuple((3, n) for n in TINY.num_classes)
    np.testing.assert_allclose(model.features(images), features, rtol=1e-6)
    predicted = scenenet.predict(model, images)
    assert predicted.shape == (3, 6) and predicted.dtype == jnp.int32
    with pytest.raises(ValueError, match="images has shape"):
        model(images[:, :16])


def test_default_size_has_twelve_attributes_and_few_parameters():
    model = nnx.eval_shape(lambda: SceneNet(SceneNetConfig(), nnx.Rngs(0)))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) < 600_000


def test_sees_where_an_object_stands(model):
    canvas = jnp.zeros((2, 32, 32, 3))
    canvas = canvas.at[0, 12:20, 0:8].set(1.0).at[1, 12:20, 24:32].set(1.0)
    left, right = model.features(canvas)
    assert jnp.linalg.norm(left - right) > 0.1 * jnp.linalg.norm(left)


def test_learns(model):
    images, labels = images_and_labels()
    mask = scenenet.slot_mask(labels)
    graph, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(lambda p: scenenet.loss(nnx.merge(graph, p)(images)[1], labels, mask))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, grads

    losses = []
    for _ in range(40):
        params, opt_state, value, grads = step(params, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    assert all(np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))
    fitted = scenenet.attribute_accuracy(scenenet.predict(nnx.merge(graph, params), images), labels, mask)
    assert np.nanmean(fitted) > 0.9


def test_loss_by_hand_and_masked_slots_have_no_gradient():
    labels = jnp.array([[0, 1, 2, 0, 4, 1], [3, 0, 0, 2, 3, 0]])  # the first place is empty in the first image
    mask = scenenet.slot_mask(labels)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    logits = tuple(jnp.zeros((2, n)) for n in TINY.num_classes)
    uniform = (2 * np.log([4, 3, 4, 3]).sum() + np.log([5, 2]).sum()) / 10
    np.testing.assert_allclose(scenenet.loss(logits, labels, mask), uniform, rtol=1e-6)
    gradients = jax.jit(jax.grad(scenenet.loss))(logits, labels, mask)
    for i, gradient in enumerate(gradients):
        np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=1), mask[:, i])


def test_accuracies_by_hand():
    labels = jnp.array([[0, 1, 2, 0, 0, 0], [3, 0, 0, 2, 3, 0]])
    logits = tuple(jax.nn.one_hot(labels[:, i], n) for i, n in enumerate(TINY.num_classes))
    predicted = scenenet.labels_from_logits(logits)
    np.testing.assert_array_equal(predicted, [[0, 1, 2, 0, -1, -1], [3, 0, 0, 2, 3, 0]])
    wrong = predicted.at[1, 3].set(1)
    accuracy = scenenet.attribute_accuracy(wrong, labels, scenenet.slot_mask(labels))
    np.testing.assert_allclose(accuracy, [1, 1, 1, 0.5, 1, 1])
    mentioned = jnp.array([[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]], bool)
    per_image, right, total = scenenet.caption_accuracy(wrong, labels, mentioned)
    np.testing.assert_allclose(per_image, [1, 2 / 3], rtol=1e-6)
    assert (int(right), int(total)) == (4, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3)])
def test_save_and_load(model, tmp_path, dtype, tolerance):
    images, _ = images_and_labels(2)
    model.save(tmp_path, dtype)
    loaded = SceneNet.load(tmp_path)
    assert loaded.config == TINY
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(loaded, nnx.Param)))
    features = model(images)[0]
    np.testing.assert_allclose(loaded(images)[0], features, atol=4 * tolerance * float(jnp.max(features)))
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
