"""The registered stages of the benchmark, and one that is added as the documentation says."""

import json
import re
from pathlib import Path

import pytest
import tyro

from eval import benchmark
from eval.stages import STAGES

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def stage():
    """The stage of the documentation, registered for a test."""
    section = PAGE.read_text().split("\n## A benchmark stage\n")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) < 40
    exec(compile(code, str(PAGE), "exec"), {})
    yield STAGES.find("fft")
    STAGES.remove("fft")


def test_a_new_stage_runs_and_has_its_table(stage, tmp_path, capsys):
    args = tyro.cli(
        benchmark.Arguments, args=["fft", "--batches", "3", "5", "--rounds", "3", "--folder", str(tmp_path)]
    )
    benchmark.run(args)
    (path,) = tmp_path.glob("fft-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["implementation"], row["batch"]) for row in rows] == [(n, b) for b in (3, 5) for n in ("JAX", "NumPy")]
    benchmark.run(benchmark.Arguments("tables", folder=tmp_path))
    text = (tmp_path / "benchmarks.md").read_text()
    assert "**transforms of 256 values; batch 5**" in text and "| implementation | million transforms/s |" in text
    assert f"| NumPy | {rows[-1]['per_second'] / 1e6:.3g} [" in text
    assert "million transforms/s" in capsys.readouterr().out
    assert STAGES.names[-1] == "fft"


def test_what_no_stage_is_called_is_told():
    with pytest.raises(ValueError, match="^stage is 'fft'; it must be one of channel, codec, .*profile$"):
        benchmark.run(benchmark.Arguments("fft"))


@pytest.mark.parametrize("stage", list(STAGES), ids=lambda stage: stage.name)
def test_a_stage_says_what_it_is(stage):
    assert stage.title in benchmark.STAGE_HELP and len(set(stage.columns)) == len(stage.columns) > 1
    stage.check(benchmark.Arguments(stage.name))
