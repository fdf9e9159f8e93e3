"""Ahead-of-time compilation for TPU topologies: sizes of the published models, programs, results and tables."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eval import aot, aot_jobs, aot_tables
from megjax.configs import read_json, write_json
from megjax.diffusion.clip import CLIPTextModel
from megjax.diffusion.layers import ShapeRngs
from megjax.diffusion.unet import UNet2DConditionModel
from megjax.diffusion.vae import AutoencoderKL
from megjax.sharding import AXES
from megjax.tpu import TpuConfig
from tests.checks import needs_libtpu

FOLDER = Path(__file__).parents[2] / "tpu_configs"


def num_parameters(build, config):
    shapes = nnx.state(nnx.eval_shape(lambda: build(config, rngs=ShapeRngs())))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "text", "unet"),
    [
        ("sd15", 123_060_480, 859_520_964),
        pytest.param("sd21", 340_387_840, 865_910_724, marks=pytest.mark.slow),
    ],
)
def test_models_have_the_published_number_of_parameters(name, text, unet, unchecked):
    configs, length = aot_jobs.model_configs(name, jnp.bfloat16)
    assert length == 77
    assert num_parameters(CLIPTextModel, configs.text_encoder) == text
    assert num_parameters(UNet2DConditionModel, configs.unet) == unet
    assert num_parameters(AutoencoderKL, configs.vae) == 83_653_863


@pytest.mark.parametrize(
    "job", [job if job == "sweep" else pytest.param(job, marks=pytest.mark.slow) for job in aot_jobs.JOBS]
)
def test_jobs_of_the_bundled_model_lower(job, unchecked, usual_promotion):
    """On one CPU device, which has no less to trace than a topology.

    JAX's formula of attention has a gradient in half precision that mixes types when it is lowered.
    """
    config = TpuConfig.from_file(FOLDER / "v5e-8.json")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    program = aot_jobs.Jobs(config, mesh, "scenes", num_steps=2).make(job)
    assert program.items >= 1 and program.knob == ("--latency-mesh" if job == "latency" else f"batch.{job}")
    assert "func.func public @main" in program.lower().as_text()


@pytest.mark.parametrize(("model", "images"), [("sd15", 64), ("sd21", 16), ("scenes", 4096)])
def test_batches_follow_the_size_of_images(model, images):
    """512x512, 768x768 and 64x64; the file's batch is for the first."""
    config = TpuConfig.from_file(FOLDER / "v5e-8.json")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    assert config.batch.generate == 64 and aot_jobs.Jobs(config, mesh, model)._count("generate") == images


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="--job is 'paint'"):
        aot.run(aot.Arguments(job="paint", output=tmp_path))
    with pytest.raises(ValueError, match="--model-config is 'sdxl'"):
        aot.run(aot.Arguments(model_config="sdxl", output=tmp_path))
    with pytest.raises(ValueError, match="--effort is 2"):
        aot.run(aot.Arguments(effort=2.0, output=tmp_path))


def test_the_plan_has_every_job_on_every_topology():
    listed = aot.plan(aot.Arguments(tpu_config=FOLDER / "v5e-8.json"))
    assert len(listed) == len(set(listed))
    files = set(FOLDER.glob("*.json"))
    for job in aot_jobs.JOBS:
        if job != "latency":
            assert {one.tpu_config for one in listed if one.job == job} == files
    assert {one.latency_mesh for one in listed if one.job == "latency"} == set(aot.LATENCY_MESHES)


def make_small(rows):
    """A stand-in for `Jobs.make`: ten products of a batch with one matrix, and the sum over the devices."""

    def make(self, job):
        def fn(w, x):
            y = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 10)[0]
            return y.astype(jnp.float32).sum()

        split = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        w = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=self.everywhere)
        x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16, sharding=split)
        return aot_jobs.Program(fn, (w, x), rows, "rows", "batch.generate")

    return make


@needs_libtpu
def test_a_small_program_compiles_and_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot_jobs.Jobs, "make", make_small(8 * 1024))
    args = aot.Arguments(tpu_config=FOLDER / "v5e-8.json", model_config="scenes", output=tmp_path)
    (result,) = aot.run(args)
    per_device = 2 * 1024 * 512 * 512
    assert result["flops"] == pytest.approx(10 * per_device, rel=0.1)
    assert result["flops_loops_once"] == pytest.approx(per_device, rel=0.1)
    assert [c["kind"] for c in result["collectives"]] == ["all-reduce"]
    assert result["memory"]["arguments"] == pytest.approx(2 * (512 * 512 + 1024 * 512), rel=0.01)
    assert result["devices"] == 8 and result["items_per_second"] > 0
    assert "roofline: compute" in capsys.readouterr().out
    assert read_json(tmp_path / "v5e-8-generate-scenes.json") == result

    def fail(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(aot, "measure", fail)
    assert aot.run(args) == [result]
    aot_tables.write(tmp_path, tmp_path / "tpu.md")
    assert "| generate | scenes | v5e:2x4 | 8,192 rows |" in (tmp_path / "tpu.md").read_text()


@needs_libtpu
def test_what_does_not_fit_names_the_knob(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_jobs.Jobs, "make", make_small(8 * 2**24))
    with pytest.raises(ValueError, match=r"v5e-8.json: generate .*; lower batch.generate") as error:
        aot.run(aot.Arguments(tpu_config=FOLDER / "v5e-8.json", model_config="scenes", output=tmp_path))
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.json"))


def test_weak_scaling_is_tabulated_where_a_job_has_several_sizes():
    bounds = {"compute": 1e-3, "memory": 2e-3, "interconnect": 1e-4}
    one = {"job": "codec", "model": "scenes", "topology": "v5e:2x4", "devices": 8, "batch": 1, "collectives": []}
    one |= {"roofline_seconds": bounds}
    sent = [{"kind": "all-reduce", "count": 2, "bytes": 1e6, "sent": 2e6}]
    wide = one | {"topology": "v5e:8x8", "devices": 64, "collectives": sent}
    wide |= {"roofline_seconds": bounds | {"interconnect": 4e-3}}
    other = one | {"topology": "v6e:2x4"}
    lines = aot_tables.weak_scaling([wide, other, one]).splitlines()
    assert lines[-2:] == [
        "| codec | scenes | v5e | 8 | 0 MB | 2 ms | 100% |",
        "| codec | scenes | v5e | 64 | 2 MB | 4 ms | 50% |",
    ]
    assert aot_tables.weak_scaling([one, other]) == ""


def test_tables_of_latency_and_effort(tmp_path):
    bounds = {"compute": 1e-3, "memory": 4e-3, "interconnect": 0.0}
    memory = {"arguments": 2**30, "temporaries": 2**30, "code": 2**20, "total": 2**31, "hbm": 2**34}
    one = {"job": "latency", "model": "sd15", "topology": "v5e:2x4", "devices": 1, "batch": 1, "collectives": []}
    one |= {"roofline_seconds": bounds, "memory": memory, "mesh": {"data": 1, "tensor": 1}, "items": 1, "unit": "image"}
    one |= {
        "flops": 1e12,
        "bytes_accessed": 1e9,
        "causes": {"gradient of dot_general": 5e8, "copy": 1e8},
        "bound": "memory",
        "items_per_second": 1.0,
        "compile_seconds": 3.0,
    }
    one |= {"identity": {"jax": "0", "libtpu": "0", "effort": -1.0, "accounting": aot_tables.ACCOUNTING}}
    two = one | {"devices": 2, "mesh": {"data": 1, "tensor": 2}}
    two |= {"roofline_seconds": {"compute": 5e-4, "memory": 1e-3, "interconnect": 1e-3}}
    job = one | {"job": "generate"}
    usual = job | {"identity": one["identity"] | {"effort": 0.0}, "compile_seconds": 12.0}
    folder = tmp_path / "aot"
    (folder / "other").mkdir(parents=True)
    for i, result in enumerate((one, two, job, usual)):
        write_json(folder / f"{i}.json", result)
    write_json(folder / "old.json", job | {"identity": one["identity"] | {"accounting": 1}})
    earlier = job | {"items": 4, "bytes_accessed": 8e9, "bound": "compute"}
    write_json(folder / aot_tables.BEFORE, {"commit": "abc", "results": [earlier]})
    aot_tables.write(folder, tmp_path / "tpu.md")
    text = (tmp_path / "tpu.md").read_text()
    assert "| v5e:2x4 | 2 | 1 | 2 | 1.00 | 0 | 0 MB | 1 ms | 2 ms | 2.0 |" in text
    assert "| generate | sd15 | v5e:2x4 | 0 | 1.00 GiB | 1 MiB | 12% | 1 | 4 ms | 12 s |" in text
    assert text.count("| generate | sd15 | v5e:2x4 | 1 image |") == 1
    assert "Of 5 programs, 1 are left out" in text
    assert "| generate | sd15 | v5e | 1 | gradient of dot_general 50%, copy 10% |" in text
    assert "| generate | sd15 | v5e:2x4 | 4 | 1 | 1.00 | 1.00 | 12% | 12% | 2e+03 | 1e+03 | 1e+03 us, compute |" in text


@needs_libtpu
def test_devices_of_latency_are_checked(tmp_path):
    for mesh in ((0, 4), (4, 4)):
        with pytest.raises(ValueError, match="latency.mesh"):
            aot.run(aot.Arguments(FOLDER / "v5e-8.json", "latency", latency_mesh=mesh, output=tmp_path))
