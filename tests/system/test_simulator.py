"""The whole protocol as one program: every scheme from token ids, draws, batching, mapping, retracing, own parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import NoFading, RayleighFading
from megjax.codec import link
from megjax.system import simulate
from megjax.system import simulator as simulators

PROMPTS = ["a red house", "two boats by night"]
FORMS = [
    ("centralized", "analog"),
    ("centralized", "qam"),
    ("centralized", "coded"),
    ("latent", "symbol"),
    ("latent", "wiener"),
    ("seed", "learned"),
    ("seed", "klt"),
    ("split", "latent"),
    ("split", "seed"),
    ("prompt", "device"),
]
FLOAT32 = 1e-4  # the same computation in another order


@pytest.fixture(scope="module")
def ids(pipe):
    return pipe.tokenize(PROMPTS)


@pytest.mark.parametrize(
    ("scheme", "variant", "options"),
    [
        ("centralized", "coded", {"policy": "equal"}),
        ("latent", "symbol", {"decode_batch": 2}),
        ("seed", "learned", {"guided": True}),
        ("split", "latent", {"guided": True, "device_steps": 2, "server_steps": 1}),
        ("split", "seed", {"guided": True, "device_steps": 1}),
        ("prompt", "device", {"device_steps": 1}),
    ],
)
def test_token_ids_to_received_images(pipe, make, ids, scheme, variant, options):
    simulator = make(scheme, variant, **options)
    sent = jax.jit(simulator, static_argnames="realisations")(
        jax.random.key(0), simulator.params, ids, 8.0, realisations=3, guidance_scale=2.0
    )
    assert sent.delivery.images.shape == (2, 3, 16, 16, 3) and sent.delivery.images.dtype == jnp.float32
    assert np.all(np.isfinite(sent.delivery.images))
    assert float(sent.delivery.images.min()) >= 0 and float(sent.delivery.images.max()) <= 1
    assert sent.delivery.gains.shape == (2, 3, 16) and sent.delivery.energy.shape == (2, 3)
    np.testing.assert_allclose(sent.source.images, pipe.decode(sent.source.latents), atol=FLOAT32)
    partial_differs = np.abs(sent.source.partial - sent.source.latents).max() > 0.01
    assert partial_differs == (variant == "latent")
    if scheme == "centralized":
        assert sent.delivery.latents is None
    else:
        found = sent.delivery.latents.reshape(6, 4, 4, 4)
        np.testing.assert_allclose(sent.delivery.images.reshape(6, 16, 16, 3), pipe.decode(found), atol=FLOAT32)


def test_the_servers_latents_are_those_of_the_pipeline(pipe, make, ids):
    simulator = make(guided=True)
    key = jax.random.key(1)
    source = jax.jit(simulator.infer)(key, simulator.params, ids, None, 2.5)
    expected = pipe.generate_latents(jax.random.clone(key), ids, num_steps=2, guidance_scale=2.5)
    np.testing.assert_allclose(source.latents, expected, atol=FLOAT32 * np.abs(expected).max())


def test_a_good_channel_shows_what_was_sent(make, deliver, source):
    for scheme, variant in FORMS:
        if variant in ("coded", "klt") or scheme in ("split", "prompt"):
            continue  # the image codec has tests of its own; a random network finishes what is split
        options = {"rate": 1.0, "fading": NoFading(), "policy": "equal"}
        delivery = deliver(make(scheme, variant, **options), source, 80.0, 1)
        if scheme == "centralized":
            tolerance = 1e-3 if variant == "analog" else 1 / 500  # half of a level of 8 bits
            assert np.abs(delivery.images[:, 0] - source.images).max() < tolerance, variant
        else:
            assert np.abs(delivery.latents[:, 0] - source.latents).max() < 2e-3, (scheme, variant)


def test_no_signal_shows_the_mean(make, deliver, source):
    analog = deliver(make("centralized", "analog", policy="equal"), source, -80.0, 1)
    np.testing.assert_allclose(analog.images, np.broadcast_to([0.4, 0.5, 0.6], analog.images.shape), atol=2e-3)


def test_schemes_given_the_same_key_see_the_same_gains(make, deliver, source):
    forms = [form for form in FORMS if form[1] not in ("wiener", "klt", "device")]  # on the same link as another
    seen = [deliver(make(*form, policy="equal"), source, 5.0, 3).gains for form in forms]
    for other in seen[1:]:
        np.testing.assert_array_equal(seen[0], other)
    assert len(np.unique(np.asarray(seen[0]))) == seen[0].size


@pytest.mark.parametrize(("scheme", "variant"), [("seed", "learned"), ("split", "latent"), ("centralized", "qam")])
def test_a_realisation_does_not_depend_on_how_many_are_asked_for(make, source, scheme, variant):
    simulator = make(scheme, variant, device_steps=1)
    ids = jnp.zeros((6, 48), jnp.int32)

    @jax.jit
    def run(source, ids, images, draws):
        key = jax.random.key(3)
        found = simulator.deliver(key, simulator.params, source, ids, 4.0, images, draws, generate=scheme != "seed")
        return found._replace(latents=found.latents if scheme == "seed" else None)

    whole = run(source, ids, jnp.arange(6), jnp.arange(5))
    some = jnp.asarray([4, 1])
    few = run(jax.tree.map(lambda x: x[some], source), ids[some], some, jnp.asarray([3]))
    for name in ("images", "latents", "gains", "power", "energy"):
        mine, others = getattr(few, name), getattr(whole, name)
        if mine is not None:
            np.testing.assert_allclose(mine[:, 0], others[some, 3], atol=FLOAT32)


def test_mapping_over_keys_and_snrs_equals_the_loop(make, source):
    simulator = make()
    keys, levels = jax.random.split(jax.random.key(0), 3), jnp.asarray([-3.0, 4.0, 11.0])

    def run(key, snr_db):
        numbers = jnp.arange(6), jnp.arange(2)
        return simulator.deliver(key, simulator.params, source, None, snr_db, *numbers, generate=False).latents

    together, one = jax.jit(jax.vmap(run))(keys, levels), jax.jit(run)
    for i in range(3):
        np.testing.assert_allclose(together[i], one(jax.random.clone(keys)[i], levels[i]), atol=FLOAT32)


def test_latents_are_generated_once_for_all_realisations(make, ids):
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
    delivery = deliver(simulator, source, 200.0, 2)
    np.testing.assert_allclose(np.abs(delivery.gains[0, 0, :3]), [0.1, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(delivery.power, np.broadcast_to([0.0, 2.0] * 8, (6, 2, 16)))
    # Two symbols, four values a block; the blocks without power give zeros, the others what was sent.
    found, sent = np.asarray(delivery.latents).reshape(6, 2, 16, 4), np.asarray(source.latents).reshape(6, 1, 16, 4)
    assert np.all(found[:, :, ::2] == 0)
    np.testing.assert_allclose(found[:, :, 1::2], np.broadcast_to(sent[:, :, 1::2], (6, 2, 8, 4)), atol=1e-4)


def test_a_second_simulation_never_compiles_again(pipe, codec):
    def run(seed, snr_db, prompts, guidance_scale, parts):
        key = jax.random.key(seed)
        options = {"num_steps": 2, "rate": 2.0, "realisations": 2, "guidance_scale": guidance_scale}
        return simulate(key, pipe, parts[0], prompts, "seed", parts[1], snr_db, parts[2], **options)

    for parts in ((codec, RayleighFading(), "equal"), (PlainCodec(), PlainFading(), PlainPolicy())):
        first = run(0, 3.0, PROMPTS, 3.0, parts)
        size = simulators.run._cache_size()
        again = run(0, 3.0, PROMPTS, 3.0, parts)
        np.testing.assert_array_equal(first.delivery.images, again.delivery.images)
        run(1, 7.5, PROMPTS[::-1], 2.0, parts)
        assert simulators.run._cache_size() == size


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
    given = {"prompts": PROMPTS, "rate": 2.0, "num_steps": 2} | options
    with pytest.raises(ValueError, match=match) as error:
        simulate(jax.random.key(0), pipe, codec, **given)
    assert "\n" not in str(error.value)


def test_more_bad_input(pipe, codec, make, source):
    with pytest.raises(TypeError, match="colour"):
        simulate(jax.random.key(0), pipe, codec, PROMPTS, colour="red")
    simulator, numbers = make("split"), (jnp.arange(6), jnp.arange(1))
    with pytest.raises(ValueError, match="ids is None.*denoises"):
        simulator.deliver(jax.random.key(0), simulator.params, source, None, 0.0, *numbers)
