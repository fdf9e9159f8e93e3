"""The examples of docs/extending.md, each run as it stands: parts that no other file of the project knows."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import FADINGS, find_fading
from megjax.diffusion.samplers import SAMPLERS
from megjax.metrics import METRICS
from megjax.power import POLICIES, check_policy, gain_law, make_policy, power_problem
from megjax.registry import Record, Registry
from megjax.sweep import SweepConfig, run_sweep
from megjax.system import SCHEMES

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
REGISTRIES = (FADINGS, METRICS, POLICIES, SAMPLERS, SCHEMES)
MAX_LINES = 40


def blocks(heading):
    """Python blocks of a section of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def example(monkeypatch, unchecked):
    """`example(heading)`: run a section's first block as a module, then the others; what it registers goes after."""
    before = {registry.kind: registry.names for registry in REGISTRIES}

    def run(heading):
        first, *others = blocks(heading)
        assert len(first.splitlines()) < MAX_LINES, heading
        module = types.ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)
        exec(compile(first, "example", "exec"), vars(module))
        for block in others:
            exec(compile(block, "use", "exec"), vars(module))
        return module

    yield run
    for registry in REGISTRIES:
        for name in set(registry.names) - set(before[registry.kind]):
            registry.remove(name)


def test_a_law(example):
    module = example("A fading law")
    gains = jax.jit(jax.vmap(lambda key: module.law.sample(key, 4)))(jax.random.split(jax.random.key(0), 20_000))
    power = np.square(np.abs(np.asarray(gains)))
    assert abs(power.mean() - 1) < 4 * power.std() / np.sqrt(power.size)
    law = gain_law(find_fading("weibull:3"))
    assert float(law.mean(law.gains)) == pytest.approx(1, abs=1e-3)
    assert float(law.mean(jnp.square(law.gains))) == pytest.approx(np.square(power).mean(), rel=0.02)
    assert np.all(module.optimum.allocate(jnp.ones(4), power_problem(0.0, 4)) > 0)


def test_a_policy(example):
    example("A power policy")
    assert "proportional" in POLICIES
    check_policy(make_policy("proportional", find_fading("rayleigh")), find_fading("rayleigh"), 16)


@pytest.mark.slow
def test_a_scheme_and_a_metric_in_one_sweep(example, tmp_path):
    example("A scheme")
    example("A metric")
    config = SweepConfig(
        schemes=("thumbnail", "thumbnail:tile=4", "latent"),
        snr_db=(10.0,),
        modes=("equal_power",),
        num_images=2,
        realisations=2,
        steps=2,
    )
    frame = run_sweep(config, tmp_path / "sweep", latents=tmp_path / "latents", progress=False)
    assert frame.scheme.tolist() == list(config.schemes)
    np.testing.assert_allclose(frame.num_symbols[:2], [96, 384])
    assert np.all(frame.contrast > 0) and np.all(frame.psnr_db > 0)


def test_a_name_is_registered_once():
    table = Registry("toy", "megjax.data", "megjax.toys")
    part = Record(name="a", title="A")
    table.register(part)
    assert table.register(part) is part
    with pytest.raises(ValueError, match="name of a toy is 'a'; it must be not yet registered"):
        table.register(Record(name="a", title="another"))
    table.register(Record(name="b", title="B", rank=1))
    assert table.names == ("b", "a")
    with pytest.raises(ValueError, match="toy is 'c'; it must be one of b, a"):
        table.find("c")


def test_a_sampler(example):
    module = example("A sampler")
    assert module.latents.shape[0] == 1 and np.all(np.isfinite(module.latents))
