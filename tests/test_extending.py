"""The examples of docs/extending.md, each run as it stands: parts that no other file of the project knows."""

import hashlib
import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import FADINGS, find_fading
from megjax.data import scenes
from megjax.diffusion.samplers import SAMPLERS
from megjax.metrics import METRICS
from megjax.power import POLICIES, check_policy, gain_law, make_policy, power_problem
from megjax.registry import Record, Registry
from megjax.sweep import SweepConfig, run_sweep
from megjax.system import SCHEMES
from tests.sweep.conftest import flat_picture

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
REGISTRIES = (FADINGS, METRICS, POLICIES, SAMPLERS, SCHEMES)
MAX_LINES = 40
TOYS = Registry("toy", "megjax.data", "megjax.toys")


class Bear:
    name, title, version, rank = "bear", "Bear", None, 1


def blocks(heading):
    """Python blocks of a section of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def example(monkeypatch, tmp_path, unchecked):
    """`example(heading)`: import a section's first block, then run the others; what it registers goes after."""
    before = {registry.kind: registry.names for registry in REGISTRIES}

    def run(heading):
        first, *others = blocks(heading)
        assert len(first.splitlines()) < MAX_LINES, heading
        name = heading.replace(" ", "_")
        (tmp_path / f"{name}.py").write_text(first)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(name)
        for block in others:
            exec(compile(block, "use", "exec"), vars(module))
        return module

    yield run
    for registry in REGISTRIES:
        for name in set(registry.names) - set(before[registry.kind]):
            registry.remove(name)


def test_a_law(example):
    module = example("A fading law")
    # The law is an argument of compiled programs, as it is in a simulator.
    sample = jax.jit(lambda law, keys: jax.vmap(lambda key: law.sample(key, 4))(keys))
    gains = sample(module.law, jax.random.split(jax.random.key(0), 20_000))
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
def test_a_scheme_and_a_metric_in_one_sweep(example, tiny_model, tmp_path, fast_compile, monkeypatch):
    example("A scheme")
    example("A metric")
    monkeypatch.setattr(scenes, "render", flat_picture)  # pictures of scenes take long to compile
    config = SweepConfig(
        models=(str(tiny_model),),
        schemes=("thumbnail", "thumbnail:tile=8", "latent"),
        snr_db=(10.0,),
        modes=("equal_power",),
        num_images=2,
        realisations=2,
        num_blocks=4,
        steps=1,
    )
    frame = run_sweep(config, tmp_path / "sweep", latents=tmp_path / "latents", progress=False)
    assert frame.scheme.tolist() == list(config.schemes)
    assert frame.num_symbols[0] == 4 * frame.num_symbols[1]
    assert np.all(frame.contrast > 0) and np.all(frame.psnr_db > 0)


def test_a_name_is_registered_once():
    table = Registry("toy", "megjax.data", "megjax.toys")
    part = Record(name="a", title="A")
    table.register(part)
    assert table.register(part) is part
    with pytest.raises(ValueError, match="name of a toy is 'a'; it must be not yet registered"):
        table.register(Record(name="a", title="another"))
    assert table.register(part := Record(name="a", title="another"), replace=True) is part
    with pytest.raises(ValueError, match="name of a toy is 'a:b'; it must be of letters"):
        table.register(Record(name="a:b", title="AB"))
    table.register(Record(name="b", title="B", rank=1))
    assert table.names == ("b", "a")
    with pytest.raises(ValueError, match="toy is 'c'; it must be one of b, a"):
        table.find("c")


def test_a_version_is_a_number_or_the_text_of_the_module(monkeypatch):
    table = Registry("toy", "megjax.data", "megjax.toys")
    table.register(Record(name="numbered", title="", version=3))
    table.register(type("Written", (), {"name": "written", "title": "", "rank": 1, "version": None}))
    text = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert table.version_of("numbered") == 3 and table.version_of("written") == text
    monkeypatch.delattr(sys.modules[__name__], "__file__")
    with pytest.raises(ValueError, match="version of toy 'written' is None; it must be a number"):
        table.version_of("written")


def test_modules_and_entry_points_register_parts(monkeypatch, tmp_path):
    (tmp_path / "toys.py").write_text("from tests.test_extending import Bear, TOYS\n\nTOYS.register(Bear)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MEGJAX_PARTS", "toys, no_such_toys")
    with pytest.warns(UserWarning, match="toy: 'no_such_toys' of MEGJAX_PARTS cannot be loaded: No module named"):
        assert TOYS.names == ("bear",)
    assert TOYS.version_of("bear") == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    TOYS.remove("bear")
    TOYS._load(EntryPoint("any", "tests.test_extending:Bear", TOYS.group))
    assert TOYS.names == ("bear",)
    with pytest.warns(UserWarning, match="toy: 'tests.test_extending:PAGE' of page cannot be loaded: object is"):
        TOYS._load(EntryPoint("page", "tests.test_extending:PAGE", TOYS.group))


def test_a_sampler(example):
    module = example("A sampler")
    assert module.latents.shape[0] == 1 and np.all(np.isfinite(module.latents))
