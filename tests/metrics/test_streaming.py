"""Streaming metrics: batches against one shot, order of merging, masks, jit and scan."""

import subprocess
import sys

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

NUM_FEATURES = 6
# A mean 1000 deviations from zero: sums of raw squares in float32 would lose every digit of the variances.
OFFSET = 1000.0


def samples(seed=0, num=240):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(NUM_FEATURES, NUM_FEATURES))
    return (rng.normal(size=(num, NUM_FEATURES)) @ mixing + OFFSET).astype(np.float32)


def tolerance(features):
    """Of a covariance: a few float32 roundings of values near OFFSET, each multiplied by a deviation."""
    spread = np.max(np.std(features, axis=0))
    return 8 * np.finfo(np.float32).eps * OFFSET * spread


def stream(features, ends, moments=None):
    moments = moments or GaussianMoments.sized(NUM_FEATURES)
    state = moments.empty()
    for batch in np.split(features, ends):
        state = state.merge(moments.from_model_output(batch))
    return state


@pytest.mark.parametrize("ends", [[], [1, 2, 3], [100], [80, 160], list(range(7, 240, 7))])
def test_streamed_moments_equal_one_shot(ends):
    features = samples()
    mean, cov = stream(features, ends).compute()
    expected_mean, expected_cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == jnp.float32
    np.testing.assert_allclose(mean, expected_mean, rtol=4e-7)
    np.testing.assert_allclose(cov, expected_cov, atol=tolerance(features))


def test_order_of_merging_does_not_matter():
    features = samples(1)
    parts = [GaussianMoments.from_model_output(batch) for batch in np.split(features, [10, 50, 51])]
    a, b, c, d = parts
    orders = [a.merge(b).merge(c).merge(d), d.merge(c.merge(b.merge(a))), c.merge(a).merge(d.merge(b))]
    for state in orders:
        assert int(state.count) == 240
        np.testing.assert_allclose(state.compute()[0], orders[0].compute()[0], rtol=4e-7)
        np.testing.assert_allclose(state.compute()[1], orders[0].compute()[1], atol=tolerance(features))


def test_masked_rows_do_not_count():
    features = samples(2, 40)
    mask = np.random.default_rng(3).uniform(size=40) < 0.6
    padded = np.where(mask[:, np.newaxis], features, np.nan)
    masked = GaussianMoments.from_model_output(padded, mask=mask)
    kept = GaussianMoments.from_model_output(features[mask])
    assert int(masked.count) == mask.sum()
    for value, expected in zip(masked.compute(), kept.compute(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=tolerance(features))
    nothing = GaussianMoments.from_model_output(padded, mask=np.zeros(40, bool))
    np.testing.assert_allclose(nothing.merge(kept).scatter, kept.scatter)
    np.testing.assert_allclose(kept.merge(nothing).mean, kept.mean)


def test_moments_under_jit_scan_and_reduce():
    features = samples(4)
    moments = GaussianMoments.sized(NUM_FEATURES)
    assert moments is GaussianMoments.sized(NUM_FEATURES)  # one pytree structure, so states of two calls merge
    batches = jnp.asarray(features).reshape(8, 30, NUM_FEATURES)

    @jax.jit
    def scanned(batches):
        def step(state, batch):
            return state.merge(moments.from_model_output(batch)), None

        return jax.lax.scan(step, moments.empty(), batches)[0]

    expected = feature_statistics(features)
    stacked = jax.jit(jax.vmap(moments.from_model_output))(batches)
    for state in (scanned(batches), jax.jit(lambda state: state.reduce())(stacked)):
        np.testing.assert_allclose(state.compute()[0], expected[0], rtol=4e-7)
        np.testing.assert_allclose(state.compute()[1], expected[1], atol=tolerance(features))


def test_frechet_distance_of_streams():
    a, b = samples(5), samples(6)
    expected = frechet_distance(*feature_statistics(a), *feature_statistics(b))
    streamed = frechet_distance(*stream(a, [64, 128]).compute(), *stream(b, [200]).compute())
    np.testing.assert_allclose(streamed, expected, rtol=1e-4)


def test_too_few_samples_give_nan():
    moments = GaussianMoments.sized(2)
    assert np.all(np.isnan(moments.empty().compute()[0]))
    mean, cov = moments.from_model_output(jnp.ones((1, 2))).compute()
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
    results = state.compute()
    data = {name: jnp.asarray(value[:19]) for name, value in whole.items()}
    assert set(results) == {"psnr_db", "ssim", "caption_accuracy", "moments"}
    np.testing.assert_allclose(results["psnr_db"], jax.vmap(psnr)(data["reference"], data["images"]).mean(), rtol=1e-6)
    np.testing.assert_allclose(results["ssim"], jax.vmap(ssim)(data["reference"], data["images"]).mean(), rtol=1e-5)
    _, right, mentioned = scenenet.caption_accuracy(data["predicted"], data["labels"], data["mentioned"])
    np.testing.assert_allclose(results["caption_accuracy"], right / mentioned, rtol=1e-6)
    for value, expected in zip(results["moments"], feature_statistics(data["features"]), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_image_metrics_without_captions_take_no_labels():
    batch = image_batch(1, 2)
    results = make_image_metrics().single_from_model_output(reference=batch["reference"], images=batch["images"])
    assert set(results.compute()) == {"psnr_db", "ssim"}
    exact = make_image_metrics().single_from_model_output(reference=batch["images"], images=batch["images"])
    assert exact.compute()["psnr_db"] == jnp.inf
    assert np.isnan(make_image_metrics().empty().compute()["ssim"])


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
            call()


def test_importing_the_metrics_stays_light():
    code = "import sys, megjax.metrics; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "clu" in loaded
    assert not {"transformers", "diffusers", "orbax", "torch", "tensorflow"} & set(loaded)
