"""The whole protocol as one program: from token ids, batching, mapping, retracing, own parts."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.codec import link
from megjax.system import SourceStatistics, SystemConfig, simulate
from megjax.system import simulator as simulators

PROMPTS = ["a red house", "two boats by night"]
STATISTICS = SourceStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, -0.2, 0.0, 0.1), (1.2, 0.8, 1.0, 0.9))
FLOAT32 = 1e-4  # the same computation in another order


@pytest.fixture(scope="module")
def ids(pipe):
    return pipe.tokenize(PROMPTS)


WHOLE = [
    ("seed", {"guided": True, "decode_batch": 2}),
    ("prompt", {"device_steps": 1}),
    pytest.param("split", {"guided": True, "device_steps": 2, "server_steps": 1}, marks=pytest.mark.slow),
    pytest.param("centralized-coded", {"policy": "equal", "num_blocks": 8}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("scheme", "options"), WHOLE)
def test_token_ids_to_received_images(unchecked, pipe, make, ids, scheme, options):
    simulator = make(scheme, **options)
    sent = run_whole(simulator, ids, 8.0)
    assert sent.delivery.images.shape == (2, 3, 16, 16, 3) and sent.delivery.images.dtype == jnp.float32
    assert np.all(np.isfinite(sent.delivery.images))
    assert float(sent.delivery.images.min()) >= 0 and float(sent.delivery.images.max()) <= 1
    assert sent.delivery.gains.shape == (2, 3, simulator.link.num_blocks) and sent.delivery.energy.shape == (2, 3)
    partial_differs = np.abs(sent.source.partial - sent.source.latents).max() > 0.01
    assert partial_differs == (simulator.server_steps is not None)
    if scheme == "centralized-coded":
        assert sent.delivery.latents is None
        return
    latents = jnp.concatenate([sent.source.latents, sent.delivery.latents.reshape(6, 4, 4, 4)])
    images = jnp.concatenate([sent.source.images, sent.delivery.images.reshape(6, 16, 16, 3)])
    np.testing.assert_allclose(images, pipe.decode(latents), atol=FLOAT32)
    if scheme == "prompt":  # all that a realisation has is its own draw
        np.testing.assert_array_equal(run_whole(simulator, ids, -10.0).delivery.latents, sent.delivery.latents)
        assert np.abs(np.diff(np.asarray(sent.delivery.latents), axis=1)).max() > 0.1


def run_whole(simulator, ids, snr_db):
    """Three realisations for each prompt by the program that `simulate` has for this simulator."""
    key, scale = jax.random.key(0), jnp.float32(2.5)
    return simulators.run(simulator, key, simulator.params, ids, jnp.float32(snr_db), scale, 3)


@pytest.mark.slow
def test_the_servers_latents_are_those_of_the_pipeline(unchecked, pipe, make, ids):
    found = run_whole(make(guided=True, decode_batch=2), ids, 8.0).source.latents
    key = jax.random.split(jax.random.key(0))[0]
    expected = pipe.generate_latents(key, ids, num_steps=2, guidance_scale=2.5)
    np.testing.assert_allclose(found, expected, atol=FLOAT32 * np.abs(expected).max())


def test_a_second_simulation_never_compiles_again(unchecked, pipe, codec):
    def run(seed, snr_db, prompts, guidance_scale):
        config = SystemConfig(num_steps=2, statistics=STATISTICS, decode_batch=2)
        options = {"config": config, "realisations": 3, "guidance_scale": guidance_scale}
        return simulate(jax.random.key(seed), pipe, codec, prompts, "seed:rate=2", snr_db=snr_db, **options)

    first = run(0, 3.0, PROMPTS, 3.0)
    size = simulators.run._cache_size()
    again = run(0, 3.0, PROMPTS, 3.0)
    np.testing.assert_array_equal(first.delivery.images, again.delivery.images)
    run(1, 7.5, PROMPTS[::-1], 2.0)
    assert simulators.run._cache_size() == size


@pytest.mark.slow
def test_mapping_over_keys_and_snrs_equals_the_loop(unchecked, make, deliver, source):
    simulator = make()
    keys, levels = [jax.random.key(seed) for seed in range(3)], jnp.asarray([-3.0, 4.0, 11.0])

    @jax.jit
    @jax.vmap
    def together(key, snr_db):
        numbers = jnp.arange(6), jnp.arange(2)
        return simulator.deliver(key, simulator.params, source, None, snr_db, *numbers, generate=False).latents

    for seed, (found, snr_db) in enumerate(zip(together(jnp.stack(keys), levels), levels, strict=True)):
        np.testing.assert_allclose(found, deliver(simulator, source, snr_db, seed=seed).latents, atol=FLOAT32)


@pytest.mark.slow
def test_a_realisation_does_not_depend_on_how_many_are_asked_for(make, deliver, source):
    some = np.asarray([4, 1])
    whole = deliver(make(), source, 4.0)
    few = deliver(make(), jax.tree.map(lambda x: x[some], source), 4.0, some, [1])
    for name in ("latents", "gains", "power", "energy"):
        np.testing.assert_allclose(getattr(few, name)[:, 0], getattr(whole, name)[some, 1], atol=FLOAT32)


@pytest.mark.slow
def test_latents_are_generated_once_for_all_realisations(unchecked, make, ids):
    """Eight realisations cost eight deliveries and one inference: the work is counted in the program, uncompiled."""
    simulator, key = make(), jax.random.key(0)
    shapes = jax.eval_shape(simulator.infer, key, simulator.params, ids)

    def whole(realisations):
        run = jax.jit(lambda params: simulator(key, params, ids, 3.0, realisations=realisations))
        return run.lower(simulator.params).cost_analysis()["flops"]

    def delivery(realisations):
        numbers = jnp.arange(2), jnp.arange(realisations)
        run = jax.jit(lambda params, source: simulator.deliver(key, params, source, ids, 3.0, *numbers))
        return run.lower(simulator.params, shapes).cost_analysis()["flops"]

    more, sent = whole(8) - whole(1), delivery(8) - delivery(1)
    assert sent > 0
    assert abs(more - sent) < 1e-3 * sent


class PlainCodec:
    """Every value as it is, at equal power; no pytree, no base class."""

    def spending(self, snr_db, num_symbols, num_blocks, mapping):
        return link.spending(jnp.ones(64), num_symbols, num_blocks, mapping)

    def encode(self, latents, snr_db, num_symbols):
        return latents.reshape(len(latents), -1)

    def decode(self, received, snr_db, num_symbols):
        return received.estimate.reshape(-1, 4, 4, 4)


@dataclasses.dataclass
class PlainFading:
    """Two good blocks of every three; as a plain dataclass it cannot be hashed."""

    dependence: ClassVar[str] = "independent"
    period: int = 3

    def sample(self, key, num_blocks):
        return jnp.where(jnp.arange(num_blocks) % self.period > 0, 1.0, 0.1).astype(jnp.complex64)


class PlainPolicy:
    causal = True

    def allocate(self, gains, problem):
        return jnp.where(jnp.arange(gains.shape[0]) % 2 > 0, 2.0, 0.0)


def test_own_parts_of_plain_classes(make, deliver, source):
    parts = {"codec": PlainCodec(), "fading": PlainFading(), "policy": PlainPolicy()}
    simulator = make(rate=1.0, **parts)
    again = make(rate=1.0, **parts)
    assert again == simulator and hash(again) == hash(simulator)  # so it is not compiled again
    assert jax.tree.structure(again.params) == jax.tree.structure(simulator.params)
    delivery = deliver(simulator, source, 200.0)
    np.testing.assert_allclose(np.abs(delivery.gains[0, 0, :3]), [0.1, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(delivery.power, np.broadcast_to([0.0, 2.0] * 8, (6, 2, 16)))
    # Two symbols, four values a block; the blocks without power give zeros, the others what was sent.
    found, sent = np.asarray(delivery.latents).reshape(6, 2, 16, 4), np.asarray(source.latents).reshape(6, 1, 16, 4)
    assert np.all(found[:, :, ::2] == 0)
    np.testing.assert_allclose(found[:, :, 1::2], np.broadcast_to(sent[:, :, 1::2], (6, 2, 8, 4)), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"snr_db": float("nan")}, "snr_db is nan"),
        ({"snr_db": 400.0}, "snr_db is 400"),
        ({"realisations": 0}, "realisations is 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"prompts": []}, r"prompts is \[\]"),
        ({"scheme": "pigeon"}, "scheme is 'pigeon'"),
    ],
)
def test_bad_input(pipe, codec, options, match):
    given = {"prompts": PROMPTS, "scheme": "seed:rate=2", "config": SystemConfig(num_steps=2)} | options
    with pytest.raises(ValueError, match=match) as error:
        simulate(jax.random.key(0), pipe, codec, **given)
    assert "\n" not in str(error.value)


def test_more_bad_input(pipe, codec, make, source):
    with pytest.raises(TypeError, match="colour"):
        simulate(jax.random.key(0), pipe, codec, PROMPTS, colour="red")
    simulator, numbers = make("split"), (jnp.arange(6), jnp.arange(1))
    with pytest.raises(ValueError, match="ids is None.*denoises"):
        jax.eval_shape(lambda: simulator.deliver(jax.random.key(0), simulator.params, source, None, 0.0, *numbers))
