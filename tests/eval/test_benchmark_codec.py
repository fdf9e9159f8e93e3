"""Tests of the codec training benchmark: its PyTorch peer is the same model, draws and loop, and the stage runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.special import j0

from eval import benchmark
from eval.measure import Contender
from eval.stages import codec
from megjax.codec import fitting, link
from megjax.codec.fitting import Conditions
from megjax.codec.network import Constant, SeedNetwork
from megjax.codec.recipe import PRESETS
from megjax.numerics import safe_sqrt
from megjax.training import FitConfig, init_state, make_step
from megjax.units import db_to_linear, linear_to_db
from tests.checks import within_standard_error

torch_codec = codec.peer()

CONFIG = dataclasses.replace(PRESETS["tiny"].codec, decoder_blocks=2, snr_steps=5, rate_steps=4)
CONDITIONS = Conditions(groups=3, group_size=8)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


def close(found, expected, relative=1e-4):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def named(state):
    """Arrays by PyTorch's names and in its layout."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    result = {}
    for path, value in leaves:
        name, value = jax.tree_util.keystr(path, simple=True, separator="."), np.array(value)
        if name.endswith(".kernel"):
            name, value = name.removesuffix("kernel") + "weight", value.T
        result[name.replace("norm.scale", "norm.weight")] = torch.from_numpy(value.copy())
    return result


@pytest.fixture(scope="module")
def networks():
    """The two networks with the same random numbers in all parameters and constants, outputs included."""
    rng = np.random.default_rng(0)
    graph, params, constants = nnx.split(SeedNetwork(CONFIG, nnx.Rngs(0)), nnx.Param, Constant)

    def disturb(value, scale):
        return value + jnp.asarray(scale * rng.standard_normal(value.shape), jnp.float32)

    params = jax.tree.map(lambda x: disturb(x, 0.1), params)
    constants = jax.tree.map(lambda x: disturb(x, 0.03), constants)
    peer = torch_codec.TorchNetwork(CONFIG)
    kept = {k: v for k, v in named(constants).items() if not k.startswith("code_")}  # of no use in training
    peer.load_state_dict(named(params) | kept)
    return graph, params, constants, peer


@pytest.fixture(scope="module")
def drawn():
    torch.manual_seed(0)
    drawn = torch_codec.draw(CONDITIONS, 40, CONFIG.num_values, CPU)
    symbols, mapping = torch.tensor([128, 45, 16]), torch.tensor([False, False, True])
    return drawn._replace(num_symbols=symbols, interleaved=mapping)


def reference_loss(graph, params, constants, latents, total_variance, drawn):
    """`codec_loss` for given random numbers, put together from the library's functions."""
    network = nnx.merge(graph, params, constants)
    size = CONDITIONS.group_size
    batch = latents[drawn["index"].reshape(-1)]
    place = drawn["snr_db"], drawn["num_symbols"]
    row, column = (jnp.repeat(x, size) for x in network.mode(*place))
    values = network.analyse(batch, row, column).reshape(CONDITIONS.groups, size, -1)
    mean, std = fitting.group_moments(values)
    estimates, snrs = [], []
    for g in range(CONDITIONS.groups):
        snr_db, symbols = drawn["snr_db"][g], drawn["num_symbols"][g]
        block = link.block_of_value(CONFIG.num_values, symbols, CONDITIONS.num_blocks, drawn["interleaved"][g])
        spending = link.split_load(network.spend(snr_db, symbols), symbols, block, CONDITIONS.num_blocks)
        for b in range(size):
            power = jnp.where(drawn["loaded"][g, b, 0], spending.load, 1.0) * drawn["factors"][g, b]
            block_snr = drawn["gains"][g, b] * power / power.mean()
            snr = link.value_snr(spending, db_to_linear(snr_db) * block_snr, block)
            value = ((values[g] - mean[g]) / std[g])[b]
            estimates.append((snr * value + safe_sqrt(snr) * drawn["noise"][g, b]) / (1 + snr))
            snrs.append(snr)
    moments = tuple(jnp.repeat(x[:, 0], size, axis=0) for x in (mean, std))
    place = (jnp.repeat(x, size) for x in place)
    decoded = network.decode(jnp.stack(estimates), jnp.stack(snrs), *place, moments)
    error = jnp.square(decoded - batch).sum((1, 2, 3)).reshape(CONDITIONS.groups, size).mean(1)
    return linear_to_db(error / total_variance).mean()


def test_the_peer_has_as_many_parameters():
    for preset in PRESETS.values():
        ours = nnx.state(nnx.eval_shape(lambda p=preset: SeedNetwork(p.codec, nnx.Rngs(0))), nnx.Param)
        theirs = torch_codec.TorchNetwork(preset.codec).parameters()
        assert sum(p.numel() for p in theirs) == sum(x.size for x in jax.tree.leaves(ours))


def test_the_peer_computes_the_same(networks, drawn):
    graph, params, constants, peer = networks
    rng = np.random.default_rng(1)
    snr_db, symbols = np.float32([-20.0, -3.3, 7.1, 40.0]), np.array([128, 97, 45, 16])
    latents = rng.standard_normal((4, *CONFIG.latent_shape)).astype(np.float32)
    values, snr = rng.standard_normal((2, 4, CONFIG.num_values)).astype(np.float32)
    snr = np.exp(3 * snr)

    @jax.jit
    def ours(params, constants):
        network = nnx.merge(graph, params, constants)
        row, column = network.mode(snr_db, symbols)
        analysed, whitened = (
            network.analyse(jnp.asarray(latents), row, column),
            network.whiten(jnp.asarray(latents))[:, 0],
        )
        moments = jnp.zeros_like(values), jnp.ones_like(values)
        decoded = network.decode(*map(jnp.asarray, (values, snr, snr_db, symbols)), moments)
        return row, column, jax.vmap(network.spend)(snr_db, symbols), analysed, whitened, decoded

    row, column, expected_spend, expected, whitened, expected_decoded = map(np.asarray, ours(params, constants))
    with torch.no_grad():
        place = peer.position(torch.tensor(snr_db), torch.tensor(symbols))
        close(torch.round(place[0]), row)
        close(torch.round(place[1]), column)
        spend = peer.spend(torch.tensor(snr_db), torch.tensor(symbols))
        found = peer.analyse(torch.tensor(latents), *(torch.tensor(np.array(x)).long() for x in (row, column)))
        sent = np.arange(CONFIG.num_values) < 2 * symbols[:, None]
        arrived = torch.tensor(np.where(sent, values, 0)), torch.tensor(snr)
        decoded = peer.decode(*arrived, peer.features(*place))
    close(spend, expected_spend)
    close(found, expected)
    assert np.abs(expected - whitened).max() > 0.1  # the encoder has a say
    close(decoded, expected_decoded)


def test_loss_and_gradient_are_the_same(networks, drawn):
    graph, params, constants, peer = networks
    latents = np.random.default_rng(2).standard_normal((40, *CONFIG.latent_shape)).astype(np.float32)
    given = {name: jnp.asarray(value.numpy()) for name, value in drawn._asdict().items()}
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: reference_loss(graph, p, constants, latents, 250.0, given)))
    latents = jnp.asarray(latents)
    expected, gradients = value_and_grad(params)
    peer.zero_grad()
    found = torch_codec.loss_db(peer, torch.tensor(np.array(latents)), 250.0, drawn)
    found.backward()
    close(found.detach(), expected)
    gradients, theirs = named(gradients), dict(peer.named_parameters())
    assert set(gradients) == set(theirs)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        close(theirs[name].grad, gradient, 1e-3)


@pytest.mark.slow
def test_random_numbers_have_the_same_laws():
    torch.manual_seed(1)
    num, conditions = 4000, Conditions(groups=4000, group_size=8)
    ours = fitting.draw_conditions(jax.random.key(0), conditions, 256)
    theirs = torch_codec.draw(conditions, 40, 256, CPU)
    pairs = [(ours.snr_db, theirs.snr_db), (ours.interleaved, theirs.interleaved)]
    pairs += [(ours.num_symbols == k, theirs.num_symbols == k) for k in (16, 32, 64, 128)]
    pairs.append((ours.num_symbols, theirs.num_symbols))
    assert int(theirs.num_symbols.min()) == int(ours.num_symbols.min()) == 16
    assert int(theirs.num_symbols.max()) == int(ours.num_symbols.max()) == 128
    gains = jax.jit(jax.vmap(lambda key: fitting.draw_gains(key, 16)))(jax.random.split(jax.random.key(1), num))
    found = theirs.gains[:, 0]
    within_standard_error(found.mean(1), 1)
    pairs += [(f(gains), f(found)) for f in (lambda g: (g**2).mean(1), lambda g: g[:, 0] * g[:, 5], lambda g: g[:, 9])]
    load = np.linspace(0.1, 1.9, 16, dtype=np.float32)
    keys = jax.random.split(jax.random.key(2), num)
    power = jax.jit(jax.vmap(lambda key: fitting.draw_power(key, jnp.asarray(load))))(keys)
    peers = torch.where(theirs.loaded[:, 0], torch.tensor(load), 1.0) * theirs.factors[:, 0]
    peers = peers / peers.mean(1, keepdim=True)
    assert np.allclose(peers.mean(1), 1, atol=1e-5)
    pairs += [(f(power), f(peers)) for f in (lambda p: (p**2).mean(1), lambda p: p[:, 0], lambda p: p[:, 15])]
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def test_jakes_autocorrelation():
    torch.manual_seed(2)
    gains = torch_codec.jakes_gains(torch.full((8000, 1), 0.1), 16)
    assert gains.shape == (8000, 16)
    for one, other in ((2, 5), (3, 4)):  # the second across the rows of the matrix product
        within_standard_error(gains[:, one] * gains[:, other], 1 + j0(2 * np.pi * 0.1 * (other - one)) ** 2)


def test_the_loop_is_the_same():
    config = FitConfig(num_steps=8, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)
    start, target = np.random.default_rng(3).standard_normal((2, 30)).astype(np.float32)
    state = init_state(config, {"x": jnp.asarray(start)})
    step = jax.jit(make_step(config, lambda p, data, key: (jnp.square(p["x"] - target).sum(), {})))
    parameter = torch.nn.Parameter(torch.tensor(start))
    loop = torch_codec.Loop([parameter], config, lambda: (parameter - torch.tensor(target)).square().sum())
    for _ in range(config.num_steps):
        state, metrics = step(state, {}, jax.random.key(0))
        found = loop.step()
        close(torch.stack(found), np.stack([metrics["loss"], metrics["grad_norm"]]), 1e-5)
    close(parameter.detach().numpy() - start, state.params["x"] - start)
    close(loop.ema[0].numpy() - start, state.ema["x"] - start)


@pytest.mark.slow
def test_the_stage_writes_rows_and_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    benchmark.run(benchmark.Arguments("codec", preset="tiny", steps=2, rounds=3, folder=tmp_path))
    (path,) = tmp_path.glob("codec-*.json")
    result = json.loads(path.read_text())
    rows = {row["implementation"]: row for row in result["rows"]}
    assert set(rows) == {"megjax", codec.EAGER} and result["missing_peers"] == []
    for row in rows.values():
        low, high = row["steps_per_second_quartiles"]
        assert 0 < low <= row["steps_per_second"] <= high and row["batch"] == 32
        assert row["images_per_second"] == pytest.approx(32 * row["steps_per_second"])
    ratio = rows["megjax"]["steps_per_second"] / rows[codec.EAGER]["steps_per_second"]
    assert rows["megjax"]["ratio_to_eager"] == pytest.approx(ratio) and rows["megjax"]["compilation_s"] > 0
    assert any("no C++ compiler (no-such-compiler)" in note for note in result["notes"])
    benchmark.write_tables(tmp_path, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| of eager PyTorch |" in text and f"{ratio:.2f}" in text and "no C++ compiler" in text


def test_without_pytorch_there_is_a_line(monkeypatch):
    monkeypatch.setattr(codec, "megjax_contender", lambda *_: Contender("megjax", lambda: None))
    monkeypatch.setattr(codec, "peer", lambda: None)
    rows, missing, notes = codec.run("tiny", 1, 3, with_peers=True)
    assert [row["implementation"] for row in rows] == ["megjax"] and missing == ["torch_codec"] and notes == []
    assert rows[0]["ratio_to_eager"] is None


@pytest.mark.slow
def test_compiled_training_is_the_eager_one(monkeypatch):
    """The whole loss is one graph with its gradient; code is not generated from it, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    recipe, losses = PRESETS["tiny"], []
    latents = torch.randn(40, *recipe.codec.latent_shape, generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        torch.manual_seed(3)
        loop = torch_codec.training(recipe.codec, recipe.conditions, recipe.fit, latents, compiled=compiled)
        losses.append([loop.run(1)[0] for _ in range(3)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len(set(losses[0])) == 3
