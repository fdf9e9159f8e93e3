"""Tests of rollouts: the same draws however they are chunked, exact sums, resumption, clear errors."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from megjax.channel.fading import RayleighFading
from megjax.channel.parameters import channel_model
from megjax.channel.reductions import Histogram, Moments, Reduction, Samples
from megjax.channel.rollout import rollout
from tests.checks import assert_equal_trees

pytestmark = pytest.mark.usefixtures("fast_compile")
KEY = 11


def gains(key):
    """Three complex numbers from the words of the key alone: a fading law would take longer to compile."""
    real, imag = (jax.random.key_data(key) >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-23) - 1
    return jax.lax.complex(real * jnp.array([1.0, 0.6, -0.8]), imag * jnp.array([1.0, -0.8, 0.6]))


def summary(key):
    h = gains(key)
    g = jnp.square(h.real) + jnp.square(h.imag)
    return {"gain": g, "first": h[0], "outage": jnp.min(g) < 0.1}


def draw(num, chunk, **options):
    return rollout(jax.random.key(KEY), gains, num, chunk, reduction=Samples(), **options)


def test_realisation_i_has_the_key_folded_with_i():
    drawn, one = draw(20, 7), jax.jit(lambda key, i: gains(jax.random.fold_in(key, i)))
    assert drawn.shape == (20, 3) and drawn.dtype == np.complex64
    for i in range(20):
        np.testing.assert_allclose(drawn[i], one(jax.random.key(KEY), i), rtol=1e-6)


@pytest.mark.parametrize("chunk", [7, 21, 1000, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 19))])
def test_chunks_do_not_change_the_draws(chunk):
    np.testing.assert_allclose(draw(20, chunk), draw(20, 20), rtol=1e-6)


def check_that_devices_do_not_change_the_draws():
    assert len(jax.devices()) == 4
    key = jax.random.key(KEY)
    one, four = (rollout(key, gains, 53, 16, reduction=Samples(), devices=jax.devices()[:n]) for n in (1, 4))
    np.testing.assert_allclose(one, four, rtol=1e-6)
    one, four = (rollout(key, summary, 1003, 200, devices=jax.devices()[:n]) for n in (1, 4))
    assert one.count == four.count == 1003
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_devices_do_not_change_the_draws(processes):
    processes.run(check_that_devices_do_not_change_the_draws, devices=4)


@pytest.mark.parametrize(
    ("num", "chunk"),
    [(600, 250), (50, 7), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((600, 600), (2, 5)))],
)
def test_moments_are_those_of_the_samples(num, chunk):
    key = jax.random.key(KEY)
    statistics = rollout(key, summary, num, chunk)
    samples = rollout(jax.random.clone(key), summary, 600, 600, reduction=Samples())
    assert statistics.count == num
    for name, values in samples.items():
        values = values[:num].astype(np.complex128 if np.iscomplexobj(values) else np.float64)
        np.testing.assert_allclose(statistics.mean[name], values.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(statistics.variance[name], values.var(0, ddof=1), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(statistics.standard_error[name] ** 2 * num, statistics.variance[name], rtol=1e-12)


def test_moments_of_a_large_mean_keep_their_digits():
    statistics = rollout(jax.random.key(KEY), lambda key: 1e4 + jax.random.uniform(key), 2**16, 20_000)
    # float32 resolves 1e4 to 1e-3, so the variance 1/12 is that of rounded values; naive sums of squares give noise.
    assert abs(statistics.mean - 10_000.5) < 4 * np.sqrt(1 / 12 / 2**16) + 1e-3
    np.testing.assert_allclose(statistics.variance, 1 / 12, rtol=4 * np.sqrt(0.8 / 2**16) + 1e-3)


def test_one_realisation_has_no_variance():
    statistics = rollout(jax.random.key(KEY), summary, 1)
    assert statistics.count == 1 and np.isnan(statistics.variance["outage"])


def gain_and_outliers(key):
    return jnp.concatenate([summary(key)["gain"], jnp.array([jnp.nan, -1.0, 2.0])])


@pytest.mark.parametrize("chunk", [300, 90])
def test_histogram_counts_every_entry(chunk):
    counts = rollout(jax.random.key(KEY), gain_and_outliers, 300, chunk, reduction=Histogram(0.0, 2.0, 8))
    samples = np.asarray(rollout(jax.random.key(KEY), gain_and_outliers, 300, 300, reduction=Samples()))
    inside = np.histogram(samples[samples < 2], counts.edges)[0]
    expected = [300, *inside, np.sum(samples >= 2) + 300]
    np.testing.assert_array_equal(counts.counts, expected)
    share = [np.mean(np.where(np.isnan(samples), np.inf, samples) < edge) for edge in counts.edges]
    np.testing.assert_allclose(counts.cdf(), share)


def test_arguments_vary_without_a_new_program():
    traces = []

    def fn(key, noise_var, model):
        traces.append(None)
        return noise_var * jnp.abs(model.sample(key, 2)) ** 2

    once, twice = (
        rollout(jax.random.key(KEY), fn, 50, 50, args=(jnp.float32(v), RayleighFading())).mean for v in (1.0, 2.0)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
    assert len(traces) == 3  # one at each call, which sees what `fn` reads, and one compilation


def test_a_reduction_of_ones_own():
    @channel_model
    class Largest:
        def partial(self, values, valid):
            return jnp.max(jnp.where(valid, values, -jnp.inf))

        def merge(self, total, part):
            return np.maximum(total, part)

        def finish(self, total):
            return float(total)

    assert isinstance(Largest(), Reduction)
    outage = rollout(jax.random.key(KEY), lambda key: jnp.abs(gains(key))[0], 20, 7, reduction=Largest())
    assert outage == pytest.approx(np.abs(draw(20, 20)[:, 0]).max())


def test_interrupted_while_the_bar_moves(tmp_path, monkeypatch):
    class Bar(tqdm):
        updates = 0

        def update(self, n=1):
            Bar.updates += 1
            if Bar.updates == 2:
                raise KeyboardInterrupt
            return super().update(n)

    path = tmp_path / "sums.safetensors"
    run = dict(key=jax.random.key(KEY), fn=summary, num=40, chunk=8)
    monkeypatch.setattr(sys.modules["megjax.channel.rollout"], "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        rollout(**run, checkpoint=path)
    resumed, whole = rollout(**run, checkpoint=path), rollout(**run)
    assert resumed.count == 40
    np.testing.assert_array_equal(resumed.mean["gain"], whole.mean["gain"])


@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_a_checkpoint_knows_the_constants_of_jitted_functions(tmp_path, make):
    def run(values):
        table = make(values)
        inner = jax.jit(lambda key: table * jnp.abs(gains(key)))
        return rollout(jax.random.key(KEY), lambda key: inner(key) + 1, 10, checkpoint=tmp_path / "sums.safetensors")

    first = run([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(run([1.0, 2.0, 3.0]).mean, first.mean)
    with pytest.raises(ValueError, match="belongs to another rollout"):
        run([1.0, 2.0, 4.0])


def test_functions_without_a_hash():
    class Callable:
        __hash__ = None

        def __call__(self, key):
            return gains(key)

    drawn = rollout(jax.random.key(KEY), Callable(), 20, 20, reduction=Samples())
    np.testing.assert_allclose(drawn, draw(20, 20), rtol=1e-6)


class Interrupting(Moments):
    """Raises KeyboardInterrupt at the given merge, as Ctrl-C would."""

    left = 0

    def merge(self, total, part):
        Interrupting.left -= 1
        if Interrupting.left == 0:
            raise KeyboardInterrupt
        return super().merge(total, part)


def test_interrupted_and_resumed_is_bit_equal(tmp_path):
    path = tmp_path / "sums.safetensors"
    run = dict(key=jax.random.key(KEY), fn=summary, num=100, chunk=9, reduction=Interrupting())
    Interrupting.left = 6
    with pytest.raises(KeyboardInterrupt):
        rollout(**run, checkpoint=path)
    kept = path.read_bytes()
    Interrupting.left = 0
    resumed = rollout(**run, checkpoint=path)
    assert Interrupting.left == -6  # 12 chunks make 11 merges, of which 5 were kept
    whole = rollout(**run)
    assert_equal_trees(resumed, whole)
    assert path.read_bytes() != kept
    again = rollout(**run, checkpoint=path)
    np.testing.assert_array_equal(again.mean["gain"], whole.mean["gain"])


def rollout_afresh(num, factor):
    return rollout(jax.random.key(KEY), lambda key: jnp.abs(gains(key)) * factor + 1.0, num).mean


def test_not_inside_a_transformation():
    def mean(scale):
        return rollout(jax.random.key(0), lambda key, s: s * jnp.abs(gains(key)), 5, args=(scale,)).mean

    with pytest.raises(ValueError, match="outside jit, vmap and grad"):
        jax.vmap(mean)(jnp.ones(2))


def test_a_checkpoint_of_another_rollout_is_refused(tmp_path):
    path = tmp_path / "sums.safetensors"
    scale = jnp.array([1.0, 2.0, 3.0])

    def run(seed=KEY, factor=scale, num=10, args=(1.0,), reduction=None):
        def fn(key, offset):
            return jnp.abs(gains(key)) * factor + offset

        return rollout(jax.random.key(seed), fn, num, args=args, reduction=reduction, checkpoint=path)

    first = run()
    np.testing.assert_array_equal(run().mean, first.mean)
    for other in (dict(seed=12), dict(factor=2 * scale), dict(args=(2.0,)), dict(reduction=Samples())):
        with pytest.raises(ValueError, match="belongs to another rollout"):
            run(**other)
    with pytest.raises(ValueError, match="num is 9; checkpoint .* already holds 10 realisations"):
        run(num=9)
    np.testing.assert_allclose(run(num=25).mean, rollout_afresh(25, scale), rtol=1e-6)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num=0), "num is 0; it must be an integer of at least 1"),
        (dict(num=-3), "num is -3"),
        (dict(num=2**32), "num is 4294967296; it must be at most 2\\^32 - 1"),
        (dict(chunk=0), "chunk is 0"),
        (dict(fn=lambda key: None), "fn returns nothing"),
        (dict(fn=lambda key: "gain"), "fn must return an array"),
        (dict(devices=[]), "devices is empty"),
        (dict(reduction=Moments), "reduction is .*; it must be Moments"),
        (dict(checkpoint="sums.npz"), "must end in .safetensors"),
        (dict(checkpoint="no/such/folder/sums.safetensors"), "folder does not exist"),
        (dict(reduction=Histogram(0.0, 1.0)), "complex leaf has no histogram"),
    ],
)
def test_bad_arguments(options, message):
    run = dict(key=jax.random.key(0), fn=gains, num=10, chunk=10)
    with pytest.raises(ValueError, match=message):
        rollout(**(run | options))


def test_bad_keys(unchecked):
    for key in (jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(ValueError, match="it must be one typed key"):
            rollout(key, gains, 10)


@pytest.mark.parametrize(
    "options", [dict(low=1.0, high=1.0), dict(low=0.0, high=np.inf), dict(low=0.0, high=1.0, bins=0)]
)
def test_bad_histograms(options):
    with pytest.raises(ValueError, match="low, high|bins"):
        Histogram(**options)


SCALE = 1.0
TABLE = np.ones(3, np.float32)


def test_changed_globals_and_attributes_are_seen():
    class Link:
        gain = jnp.float32(1)

        def __call__(self, key):
            return SCALE * TABLE[0] * self.gain * jax.random.uniform(key, (), jnp.float32)

    global SCALE
    link, compiled = Link(), sys.modules["megjax.channel.rollout"]._kept_step.cache_info

    def run():
        return float(rollout(jax.random.key(0), link, 100, progress=False).mean)

    first, misses = run(), compiled().misses
    assert run() == first and compiled().misses == misses
    try:
        SCALE = 2.0
        assert run() == pytest.approx(2 * first)
        TABLE[0] = 3.0
        assert run() == pytest.approx(6 * first)
        link.gain = jnp.float32(5)
        assert run() == pytest.approx(30 * first)
    finally:
        SCALE, TABLE[0] = 1.0, 1.0
