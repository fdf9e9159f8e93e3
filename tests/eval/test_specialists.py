"""Tests of the comparison with specialists, at a size that learns nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from eval import specialists
from megjax.codec import SeedCodec
from megjax.codec.fitting import calibrate, initial_network
from megjax.codec.recipe import PRESETS
from megjax.data import latents


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, module_unchecked, fast_compile):
    folder = tmp_path_factory.mktemp("specialists")
    z = np.asarray(jax.random.normal(jax.random.key(0), (40, 8, 8, 4)))
    for name in ("generated", "encoded", "held_out"):
        latents.build(folder / name, 40, 40, lambda shard: z, lambda shard: {"model": "noise"})
    codec = SeedCodec(calibrate(initial_network(PRESETS["tiny"].codec, z), z))
    codec.save_pretrained(folder / "codec", dtype=np.float32)
    return specialists.Arguments(
        str(folder / "codec"),
        "tiny",
        folder,
        folder / "held_out",
        (0.0,),
        (2.0,),
        steps=20,
        num=40,
        output=folder / "out",
    )


@pytest.mark.slow
def test_runs_and_resumes_to_the_same_numbers(arguments):
    rows = specialists.run(arguments)
    assert [row["fading"] for row in rows] == ["awgn", "rayleigh"]
    assert all(row["low"] <= row["loss_db"] <= row["high"] for row in rows)
    assert json.loads((arguments.output / "results.json").read_text()) == rows
    assert specialists.run(arguments) == rows


def test_loss_is_the_ratio_of_means():
    single = np.array([1.0, 2.0, 3.0])
    found = specialists.loss_db(2 * single, single)
    assert found["loss_db"] == pytest.approx(10 * np.log10(2)) == found["low"] == found["high"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [({"preset": "huge"}, "--preset is 'huge'"), ({"steps": 0}, "steps is 0"), ({"rates": (0.5,)}, "rate is 0.5")],
)
def test_bad_arguments(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        specialists.run(dataclasses.replace(arguments, **change))
