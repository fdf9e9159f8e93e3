"""Streaming metrics: batches against one shot, order of merging, masks, jit and scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.metrics import (
    GaussianMoments,
    feature_statistics,
    frechet_distance,
    make_image_metrics,
    psnr,
    scenenet,
    ssim,
)
from tests.products import inexact_products

pytestmark = pytest.mark.usefixtures("fast_compile")
NUM_FEATURES = 6
# A mean 1000 deviations from zero: sums of raw squares in float32 would lose every digit of the variances.
OFFSET = 1000.0


NUM = 168
MOMENTS = jax.jit(lambda features: GaussianMoments.sized(NUM_FEATURES).from_model_output(features))
MERGE = jax.jit(lambda one, other: one.merge(other))
COMPUTE = jax.jit(lambda state: state.compute())


def samples(seed=0, num=NUM):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(NUM_FEATURES, NUM_FEATURES))
    return (rng.normal(size=(num, NUM_FEATURES)) @ mixing + OFFSET).astype(np.float32)


def tolerance(features):
    """Of a covariance: a few float32 roundings of values near OFFSET, each multiplied by a deviation."""
    spread = np.max(np.std(features, axis=0))
    return 8 * np.finfo(np.float32).eps * OFFSET * spread


def stream(features, ends):
    state = GaussianMoments.sized(NUM_FEATURES).empty()
    for batch in np.split(features, ends):
        state = MERGE(state, MOMENTS(batch))
    return state


@pytest.mark.parametrize("ends", [[], [1, 81, 161], list(range(7, NUM, 7))])
def test_streamed_moments_equal_one_shot(ends):
    features = samples()
    mean, cov = COMPUTE(stream(features, ends))
    expected_mean, expected_cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == jnp.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=4e-7)
    np.testing.assert_allclose(cov, expected_cov, atol=tolerance(features))


def test_order_of_merging_does_not_matter():
    features = samples(1)
    a, b, c, d = (MOMENTS(batch) for batch in np.split(features, [1, 81, 161]))
    orders = [MERGE(MERGE(MERGE(a, b), c), d), MERGE(d, MERGE(c, MERGE(b, a))), MERGE(MERGE(c, a), MERGE(d, b))]
    for state in orders:
        assert int(state.count) == NUM
        for value, expected in zip(COMPUTE(state), COMPUTE(orders[0]), strict=True):
            np.testing.assert_allclose(value, expected, rtol=4e-7, atol=tolerance(features) * (value.ndim - 1))


def test_masked_rows_do_not_count():
    features = samples(2)
    mask = np.random.default_rng(3).uniform(size=NUM) < 0.6
    padded = np.where(mask[:, np.newaxis], features, np.nan)
    moments = jax.jit(lambda features, mask: GaussianMoments.from_model_output(features, mask=mask))
    masked, nothing = moments(padded, mask), moments(padded, np.zeros(NUM, bool))
    assert int(masked.count) == mask.sum()
    for value, expected in zip(COMPUTE(masked), feature_statistics(features[mask]), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=tolerance(features))
    np.testing.assert_allclose(MERGE(nothing, masked).scatter, masked.scatter)
    np.testing.assert_allclose(MERGE(masked, nothing).mean, masked.mean)


def test_moments_under_jit_scan_and_reduce():
    features = samples(4)
    moments = GaussianMoments.sized(NUM_FEATURES)
    assert moments is GaussianMoments.sized(NUM_FEATURES)  # one pytree structure, so states of two calls merge
    batches = features.reshape(8, -1, NUM_FEATURES)

    @jax.jit
    def scanned(batches):
        def step(state, batch):
            return state.merge(moments.from_model_output(batch)), None

        return jax.lax.scan(step, moments.empty(), batches)[0]

    expected = feature_statistics(features)
    stacked = jax.jit(jax.vmap(moments.from_model_output))(batches)
    for state in (scanned(batches), jax.jit(lambda state: state.reduce())(stacked)):
        mean, cov = COMPUTE(state)
        np.testing.assert_allclose(mean, expected[0], rtol=4e-7)
        np.testing.assert_allclose(cov, expected[1], atol=tolerance(features))


def test_frechet_distance_of_streams():
    a, b = samples(5), samples(6)
    expected = frechet_distance(*feature_statistics(a), *feature_statistics(b))
    streamed = frechet_distance(*COMPUTE(stream(a, [1, 81, 161])), *COMPUTE(stream(b, list(range(7, NUM, 7)))))
    np.testing.assert_allclose(streamed, expected, rtol=1e-4)


def test_too_few_samples_give_nan():
    assert np.all(np.isnan(COMPUTE(GaussianMoments.sized(NUM_FEATURES).empty())[0]))
    mean, cov = COMPUTE(MOMENTS(np.ones((1, NUM_FEATURES), np.float32)))
    np.testing.assert_array_equal(mean, 1.0)
    assert np.all(np.isnan(cov))


def image_batch(seed, num):
    rng = np.random.default_rng(seed)
    reference = rng.uniform(size=(num, 12, 13, 3)).astype(np.float32)
    return {
        "reference": reference,
        "images": np.clip(reference + 0.1 * rng.normal(size=reference.shape), 0, 1).astype(np.float32),
        "predicted": rng.integers(0, 3, size=(num, 5)).astype(np.int32),
        "labels": rng.integers(0, 3, size=(num, 5)).astype(np.int32),
        "mentioned": rng.uniform(size=(num, 5)) < 0.7,
        "features": rng.normal(size=(num, 4)).astype(np.float32),
    }


def test_image_metrics_equal_one_shot():
    options = dict(captions=True, num_features=4)
    collection = make_image_metrics(**options)
    assert collection is make_image_metrics(**options)
    update = jax.jit(lambda state, batch: state.merge(collection.single_from_model_output(**batch)))
    whole, state = image_batch(0, 24), collection.empty()
    for start in range(0, 24, 8):
        batch = {name: value[start : start + 8] for name, value in whole.items()}
        # The last batch holds 3 images, the rest is padding that differs from any image.
        mask = np.arange(8) < (3 if start == 16 else 8)
        batch = {name: np.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, 1) for name, value in batch.items()}
        state = update(state, batch | {"mask": mask})
    results = jax.jit(lambda state: state.compute())(state)
    data = {name: value[:19] for name, value in whole.items()}
    assert set(results) == {"psnr_db", "ssim", "caption_accuracy", "moments"}
    for name, metric, rounding in (("psnr_db", psnr, 1e-6), ("ssim", ssim, 1e-5)):
        values = jax.jit(jax.vmap(metric))(data["reference"], data["images"])
        np.testing.assert_allclose(results[name], np.mean(values), rtol=rounding)
    captions = data["predicted"], data["labels"], data["mentioned"]
    _, right, mentioned = jax.jit(scenenet.caption_accuracy)(*captions)
    np.testing.assert_allclose(results["caption_accuracy"], right / mentioned, rtol=1e-6)
    for value, expected in zip(results["moments"], feature_statistics(data["features"]), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_image_metrics_without_captions_take_no_labels():
    collection, batch = make_image_metrics(), image_batch(1, 8)
    compute = jax.jit(lambda reference, images: collection.single_from_model_output(reference=reference, images=images))
    results = compute(batch["reference"], batch["images"]).compute()
    assert set(results) == {"psnr_db", "ssim"}
    assert compute(batch["images"], batch["images"]).compute()["psnr_db"] == jnp.inf
    assert np.isnan(collection.empty().compute()["ssim"])


def test_bad_arguments():
    moments = GaussianMoments.sized(3)
    images = jnp.zeros((2, 12, 12, 3))
    update = make_image_metrics().single_from_model_output
    captions = make_image_metrics(captions=True).single_from_model_output
    features = make_image_metrics(num_features=3).single_from_model_output
    for call, message in (
        (lambda: GaussianMoments.empty(), "sized"),
        (lambda: GaussianMoments.sized(0), "num_features is 0"),
        (lambda: make_image_metrics(num_features=-1), "num_features is -1"),
        (lambda: moments.from_model_output(jnp.zeros((4, 2))), r"it must be \[n 3\]"),
        (lambda: GaussianMoments.from_model_output(jnp.zeros(4)), r"it must be \[n f\]"),
        (lambda: moments.from_model_output(jnp.zeros((4, 3)), mask=jnp.ones(3)), "mask has shape"),
        (lambda: moments.empty().merge(GaussianMoments.sized(2).empty()), "must agree"),
        (lambda: update(reference=images), "lack images"),
        (lambda: update(reference=images, images=images[:1]), "must agree"),
        (lambda: update(reference=images[0], images=images[0]), r"it must be \[b h w c\]"),
        (lambda: update(reference=images, images=images.astype(int)), "must be floating"),
        (lambda: update(reference=images, images=images, mask=jnp.ones(1)), "mask has shape"),
        (lambda: captions(reference=images, images=images), "lack predicted, labels, mentioned"),
        (lambda: features(reference=images, images=images), "lack features"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call)


def test_products_are_exact():
    collection = make_image_metrics(captions=True, num_features=4)

    def update(batch):
        state = collection.single_from_model_output(**batch)
        return state.merge(state).compute()

    assert inexact_products(update, image_batch(0, 2), gradient=True) == []
