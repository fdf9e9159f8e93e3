"""The stages of layers, images, guidance, scaling and profiles at tiny sizes, and the table of what was aimed at."""

import importlib
import json
import os
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import benchmark
from eval.measure import ceilings
from eval.peers import flax_diffusers, lines
from eval.stages import (
    STAGES,
    channel,
    guidance,
    image,
    layer_choices,
    limits,
    profile,
    scaling,
    startup,
    summary,
    system,
)
from megjax.diffusion.pipeline import Configs
from megjax.ldm.recipe import PRESETS

pytestmark = pytest.mark.usefixtures("module_unchecked", "fast_compile")


def printed(stage, rows):
    """The cells of every row, as many as the stage has columns."""
    cells = [stage.cells(SimpleNamespace(**row)) for row in rows]
    assert all(len(line) == len(stage.COLUMNS) for line in cells)
    return cells


def test_layers(monkeypatch):
    monkeypatch.setattr(layer_choices.layers.strips, "MANY_ELEMENTS", 1)
    rows, missing, _ = layer_choices.run(1, 3, ((8, 4),), ((8, 4),), ((16, 2, 4),), ((32, 8),))
    assert not missing and len(rows) == 5 + 4 + 3 + 3
    assert [row["ratio_to_first"] for row in rows if row["implementation"] == layer_choices.FIRST] == [1, 1, 1, 1]
    assert rows[0]["flops"] == pytest.approx(2 * 9 * 8 * 8 * 16, rel=0.5)
    printed(layer_choices, rows)


def test_a_way_that_gives_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(layer_choices, "winograd_of_stacks", lambda x, kernel: layer_choices.winograd(x, kernel) + 0.01)
    with pytest.raises(RuntimeError, match="one product of stacks is not what"):
        layer_choices.run(1, 3, ((8, 4),), (), (), ())


def tiny_configs(name, dtype):
    """In place of `model_configs`."""
    recipe = PRESETS["tiny"]
    return Configs(recipe.text_config(600), recipe.unet_config, recipe.vae_config, recipe.scheduler_config), 8


@pytest.mark.slow
def test_images_of_both_sides(monkeypatch, here, tmp_path):
    for module in (image.image_process, image.torch_image):
        monkeypatch.setattr(module, "Served", here)
    for module in (image, importlib.import_module("eval.aot_jobs")):
        monkeypatch.setattr(module, "model_configs", tiny_configs)
    monkeypatch.setattr(flax_diffusers, "PYTHON", tmp_path / "none")
    rows, missing, notes = image.run("scenes", (1,), 1, 1, True, compiled=False)
    rows = {row["implementation"]: row for row in rows}
    assert set(rows) == {image.MEGJAX, image.EAGER} and missing == ["flax_diffusers"]
    ours = rows[image.MEGJAX]
    assert ours["cached_s"] > 0 and ours["compilation_s"] > 0 and ours["temporary_bytes"] > 0
    assert all(row["peak_bytes"] > 2**26 and row["seconds"] > 0 for row in rows.values())
    assert ours["ratio_to_eager"] == pytest.approx(rows[image.EAGER]["seconds"] / ours["seconds"])
    assert any("not asked for" in note for note in notes)
    printed(image, rows.values())


@pytest.mark.slow
def test_a_process_answers():
    code = "from eval.peers.lines import serve; serve(lambda asked: ({'twice': 2 * asked['x']}, lambda: print(), %s))"
    for peak in ("None", "lambda: 5"):
        served = lines.Served([sys.executable, "-c", code % peak], {"x": 4})
        first, second = served(), served()
        served.close()
        assert served.about == {"twice": 8} and first["seconds"] > 0
        assert second["peak_bytes"] == 5 if "5" in peak else second["peak_bytes"] > 2**20


@pytest.mark.slow
def test_a_process_that_ends_is_left_out():
    def start(environ):
        return lines.Served([sys.executable, "-c", "raise ValueError('no memory')"], {})

    samples, problems = image.measure({"broken": start}, 2)
    assert samples == {} and "broken was not measured" in problems[0]
    assert "ended with code 1: ValueError: no memory" in problems[0]


def test_samples_of_processes_that_are_kept():
    """They take turns after a first call that warms up; nothing is known of a start from the cache."""
    called, seconds = [], iter([9.0, 8.0, 3.0, 1.0, 5.0])

    class Served:
        about = {"compile_s": 2.0, "temporary_bytes": 1}

        def __init__(self, name):
            self.name = name

        def __call__(self):
            called.append(self.name)
            if called.count("b") == 3:
                raise RuntimeError("no memory")
            return {"peak_bytes": 1, "seconds": next(seconds)}

        def close(self):
            called.append(f"end of {self.name}")

    starts = {name: lambda environ, name=name: Served(name) for name in (image.MEGJAX, "b")}
    samples, problems = image.measure(starts, 3, calls=2)
    assert called == [image.MEGJAX, "b"] * 3 + ["end of b", f"end of {image.MEGJAX}"]
    assert problems == ["b was not measured: no memory."]
    (row,) = image.rows_of(samples, "image", 1)
    assert row["seconds"] == 4.0 and row["rounds"] == 2 and row["cached_s"] is None
    assert printed(image, [row])[0][-1] == "-"


def test_the_system_of_other_software_alone_compiles_nothing(monkeypatch):
    models = SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(validation=np.zeros((2, 1, 1, 1))))
    monkeypatch.setattr(system, "StableDiffusion", models)
    monkeypatch.setattr(system, "SeedCodec", models)
    monkeypatch.setattr(system, "make_simulator", None)
    monkeypatch.setattr(system, "Parts", None)
    assert system.run(2, 3, 4, 3, with_peers=False, ours=False) == ([], [], [])


class FakePipe:
    """Stands in for the bundled model: images at once, longer for more of them."""

    def tokenize(self, prompts):
        return np.zeros((len(prompts), 3), np.int32)

    def generate(self, key, ids, **options):
        return jnp.zeros((len(ids), 4, 4, 3))


def test_guidance(monkeypatch):
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    found = {"generated_accuracy": figure, "generated_exact": figure, "scenenet_frechet_distance": {"mean": 9.0}}
    asked = []
    monkeypatch.setattr(guidance.StableDiffusion, "from_pretrained", lambda folder: FakePipe())
    monkeypatch.setattr(guidance.quality, "measure", lambda *args, **options: asked.append(options) or found)
    rows, _, _ = guidance.run(50, 3)
    assert [options["guidance_interval"] for options in asked] == list(guidance.INTERVALS)
    assert rows[0]["implementation"] == "0% to 100%" and rows[-1]["implementation"] == "none"
    assert rows[0]["speed_up"] == 1
    assert printed(guidance, rows)[0][3] == "50.0 [40.0, 60.0]"


def test_scaling(monkeypatch):
    monkeypatch.setattr(scaling.StableDiffusion, "from_pretrained", lambda name: FakePipe())
    rows, _, _ = scaling.run(3, with_unet=False)
    assert [row["implementation"] for row in rows[:4]] == [f"batch {n}" for n in scaling.BATCHES]
    assert len(rows) == len(scaling.BATCHES) + len(scaling.SIDES) + len(scaling.STEPS)
    assert rows[1]["seconds_an_image"] == rows[1]["seconds"] / 4 and rows[0]["to_the_first"] == 1
    printed(scaling, rows)


def test_startup(monkeypatch, here):
    """Of the two starts of a round the second finds the folder of the first, and no round that of another."""
    folders = []

    def served(command, request, environ):
        folders.append(environ["JAX_COMPILATION_CACHE_DIR"])
        return here(command, request)

    monkeypatch.setattr(startup, "Served", served)
    monkeypatch.setattr("megjax.diffusion.pipeline.StableDiffusion.from_pretrained", lambda name: FakePipe())
    rows, _, _ = startup.run(2)
    assert folders == [folders[0]] * 2 + [folders[2]] * 2 and folders[0] != folders[2]
    assert [row["implementation"] for row in rows] == [startup.EMPTY, startup.WARM]
    for row in rows:
        assert 0 < sum(row[part] for part in startup.PARTS[:3]) < row["seconds"]
    printed(startup, rows)


NUM = 2_048
"""Realisations of the channel's program."""


def answer(module, request):
    """What a stage's process says of itself, with the channel's program for so few."""
    whole = channel.block_fading
    channel.block_fading = lambda batch, installed: whole(NUM, installed)
    jax.config.update("jax_enable_compilation_cache", json.loads(os.environ["JAX_ENABLE_COMPILATION_CACHE"]))
    print("answer:", json.dumps(importlib.import_module(module)._make(request)[0]))


@pytest.fixture
def forked(processes, monkeypatch):
    """A stage's process is a fork that has imported the library, and its program small."""

    def served(command, request, environ):
        said = processes.run(answer, command[2], request, environ=environ)
        return SimpleNamespace(about=json.loads(said.rpartition("answer: ")[2]), close=lambda: None)

    monkeypatch.setattr(profile, "Served", served)


@pytest.mark.slow
def test_limits(forked):
    """The channel's program, next to ceilings of 1: XLA's count of operations."""
    rows, _, notes = limits.run({"matmul_float32": 1.0, "copy_bytes": 1.0}, ("channel",))
    assert rows, notes
    (row,) = rows
    # 16 x 64 complex symbols are written; a number takes tens of operations, a realisation is not stored twice.
    assert NUM * 1024 * 8 < row["bytes"] < 4 * NUM * 1024 * 8
    assert 20 < row["flops"] / (NUM * 1024) < 2_000
    assert row["share_of_matmul"] == row["flops_per_second"] == row["flops"] / row["seconds"]
    printed(limits, rows)


@pytest.mark.slow
def test_profiles_name_functions_of_the_library(forked):
    rows, _, notes = profile.run(("channel",))
    assert rows, notes
    assert rows[0]["file"].startswith("megjax/channel/") and 0 < rows[0]["share"] <= 1
    printed(profile, rows)


def test_image_steps_a_second_on_an_h200():
    """Sixteen guided images of 25 steps in 2 s, and calls of the U-Net in 15 ms for one guided image."""
    row = {"case": "image of sd15", "implementation": "megjax", "peak_bytes": 1, "compilation_s": 1.0, "cached_s": None}
    image = {"stage": "image", "rows": [row | {"batch": 16, "seconds": 2 / 16, "steps": 25}]}
    row = {"case": "U-Net of sd15", "implementation": "megjax", "share_of_matmul": 0.2}
    unet = {"stage": "diffusion", "rows": [row | {"batch": 2, "seconds": 0.015}]}
    machine = {"device": "NVIDIA H200", "platform": "gpu"}
    table = summary.table([image | machine, unet | machine])
    one, sixteen = (line for line in table.splitlines() if "image-steps" in line)
    assert "one guided image | 54.5 eager" in one and "| at 66.7 | 66, then 105 | yes | NVIDIA H200 |" in one
    assert "16 guided images | 75, A100 | at 200.0 | 150, then 200 | yes, and 200 |" in sixteen
    assert "from the cache" not in table
    assert "image-steps" not in summary.table([image | machine | {"device": "another"}])


def test_work_of_repeated_programs(tmp_path):
    """Three runs of a product."""
    x = jnp.ones((64, 64))
    text = jax.jit(lambda x: x @ x).lower(x).compile().as_text()
    (tmp_path / "module_0001.jit_f.cpu_after_optimizations.txt").write_text(text)
    entry = re.search(r"ROOT %([\w.\-]+)", text[text.index("ENTRY") :])[1]
    events = {("jit_f", entry): [5.0] * 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "traced", lambda call: events)
        assert limits.work_of(lambda: None, str(tmp_path)).flops == 3 * 2 * 64**3
        with pytest.raises(RuntimeError, match="its text is not there"):
            limits.work_of(lambda: None, str(tmp_path / "nowhere"))


def test_places_of_operations():
    """Operations are put down to the innermost function of the library; those that hold others are not counted."""

    def inner(x):
        return jnp.sin(x @ x)

    program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: inner(y), x))
    text = program.lower(jnp.ones((8, 8))).compile().as_text()
    found = profile.places(text)
    assert any(place.startswith("test_places_of_operations.inner in ") for place in found.values())
    loops = re.findall(r"%([\w.\-]+) = [^\n]* while\(", text)
    assert loops and not set(loops) & set(found)


def test_ceilings():
    found = ceilings(3, 64, 2**16)
    assert set(found) == {"matmul_float32", "matmul_bfloat16", "copy_bytes"} and min(found.values()) > 0
    assert "copy" in benchmark.ceilings_line(found) and benchmark.ceilings_line(None) == ""


def test_the_table_of_aims():
    row = {"case": "image", "batch": 1, "peak_bytes": 2**30, "compilation_s": 100.0, "cached_s": 20.0}
    rows = [row | {"implementation": name, "seconds": value} for name, value in (("megjax", 2.0), (summary.EAGER, 3.0))]
    result = {"stage": "image", "device": "chip", "platform": "cpu", "rows": rows}
    table = summary.table([result]).splitlines()
    assert "| image | a whole image | PyTorch, eager | 1.50 times as fast | 1 times | yes | chip |" in table
    assert "| image | from the cache | - | ready in 20.0 s | 15 s | **no** | chip |" in table
    assert "| image | compilation | - | ready in 100.0 s | 120 s | yes | chip |" in table
    assert summary.table([result | {"stage": "layers"}]) == ""


def test_aims_on_a_gpu_are_of_every_batch():
    """Next to torch.compile, and to the products of matrices from eight guided images on; not what is there again."""
    seconds = {"megjax": 1.0, summary.EAGER: 4.0, summary.COMPILED: 1.2, summary.EAGER + summary.AGAIN: 5.0}
    rows = [
        {"case": "U-Net", "batch": batch, "implementation": name, "flops_per_second": 1 / value, "share_of_matmul": 0.5}
        for batch in (2, 16)
        for name, value in seconds.items()
    ]
    result = {"stage": "diffusion", "device": "chip", "platform": "gpu", "rows": rows}
    table = summary.table([result]).splitlines()[2:]
    of = "| diffusion | a call of the U-Net, batch"
    assert table == [
        f"{of} 2 | PyTorch, eager | 4.00 times as fast | - | - | chip |",
        f"{of} 2 | PyTorch, torch.compile | 1.20 times as fast | 1 times | yes | chip |",
        f"{of} 16 | PyTorch, eager | 4.00 times as fast | - | - | chip |",
        f"{of} 16 | PyTorch, torch.compile | 1.20 times as fast | 1 times | yes | chip |",
        f"{of} 16 | matmul | 50 % | 55 % | **no** | chip |",
    ]


def test_without_a_figure_of_megjax_there_is_no_line():
    rows = [{"case": "image", "batch": 8, "implementation": summary.EAGER, "seconds": 3.0}]
    assert summary.table([{"stage": "image", "device": "chip", "platform": "gpu", "rows": rows}]) == ""


def test_images_of_several_batches(monkeypatch):
    asked = []

    def measure(starts, rounds, calls):
        asked.append(starts[image.MEGJAX].args[0]["batch"])
        first = {"compile_s": 2.0, "temporary_bytes": 1}
        return {image.MEGJAX: [first, {**first, "compile_s": 1.0, "seconds": 3.0, "peak_bytes": 1}]}, []

    monkeypatch.setattr(image, "measure", measure)
    rows, missing, _ = image.run("scenes", (1, 8), 2, 1, False)
    assert asked == [1, 8] and not missing
    assert [(row["batch"], row["seconds"], row["cached_s"]) for row in rows] == [(1, 3.0, 1.0), (8, 3.0 / 8, 1.0)]
    result = {"stage": "image", "device": "chip", "platform": "gpu", "rows": rows}
    assert "| image | from the cache, batch 8 | - | ready in 1.0 s | 15 s | yes | chip |" in summary.table([result])


def test_the_page_is_that_of_the_files(tmp_path):
    benchmark.write_tables(benchmark.ROOT / "benchmarks", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (benchmark.ROOT / "docs" / "benchmarks.md").read_text()


def test_all_runs_every_stage_and_names_those_that_fail(monkeypatch):
    calls = []

    def run(command):
        calls.append(command[3:])
        return SimpleNamespace(returncode=int("power" in command))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    with pytest.raises(ValueError, match=r"stages that failed is \['power'\]"):
        benchmark.run_all(benchmark.Arguments("all"), ["--rounds", "3"])
    assert [call[0] for call in calls] == list(STAGES.names)
    assert all(call[1:] == ["--rounds", "3"] for call in calls)
