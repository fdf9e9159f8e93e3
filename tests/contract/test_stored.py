"""Outputs of the library's parts against those that are stored for them, so that a refactoring moves no number.

The files `stored/<kind>/<name>.<version>.safetensors` hold what small computations with fixed keys give for every
fading law, power policy, sampler and scheme, and for the programs made of them. A change under an unchanged version
fails. Who means to change numbers raises the version in the part's record, or of a program in `parts.py`; who adds or
removes a part changes nothing else. In all cases, record again:

    python -m tests.contract.record

Floats agree to 1e-4 of the largest magnitude of their array, integers exactly. What coded images cost depends on the
JPEG and WebP libraries inside Pillow too.
"""

import re

import numpy as np
import pytest

from megjax.channel import FADINGS
from megjax.diffusion.samplers import SAMPLERS
from megjax.metrics import METRICS
from megjax.power import POLICIES
from megjax.system import SCHEMES
from tests.contract import parts, schemes, stored

pytestmark = pytest.mark.usefixtures("fast_compile")


def as_parameters(found):
    """The parts as parameters of a test, named and marked."""
    return [pytest.param(part, id=str(part), marks=[pytest.mark.slow] * part.slow) for part in found]


def check(part):
    """Compare a part's outputs with those that are stored."""
    expected = stored.stored_outputs(part)
    assert expected, f"no outputs of {part}, version {part.version}, are stored; {stored.RECORD}"
    lines = stored.differences(expected, part.compute())
    assert not lines, "\n".join([f"{part}, version {part.version}, gives other outputs:", *lines])


@pytest.mark.parametrize("part", as_parameters(parts.PARTS))
def test_outputs(part):
    check(part)


def test_all_parts_of_megjax_declare_a_version():
    for registry in (FADINGS, METRICS, POLICIES, SAMPLERS, SCHEMES):
        assert [part.name for part in registry if vars(part).get("version") is None] == []


def test_nothing_else_is_stored():
    found = (*parts.PARTS, *schemes.PARTS)
    assert len({part.path for part in found}) == len(found)
    others = stored.others(found)
    assert not others, f"no part has these outputs: {others}; {stored.RECORD}"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": np.float32([1.00005, -2]), "b": np.int32([3])}, None),
        ({"a": np.float32([1.0003, -2]), "b": np.int32([3])}, "a: off by up to 0.0003"),
        ({"a": np.float32([1, np.nan]), "b": np.int32([3])}, "a: values that are not finite"),
        ({"a": np.float64([1, -2]), "b": np.int32([3])}, "a: shape and type"),
        ({"a": np.float32([1, -2]), "b": np.int32([4])}, r"b: \[4\], stored \[3\]"),
        ({"a": np.float32([1, -2])}, "b is missing"),
        ({"a": np.float32([1, -2]), "b": np.int32([3]), "c": np.int32([3])}, "c is not stored"),
    ],
)
def test_differences(found, message):
    lines = stored.differences({"a": np.float32([1, -2]), "b": np.int32([3])}, found)
    if message is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.match(message, line)


def test_recording_keeps_to_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    values = {"x": np.float32([1, 2]), "count": np.asarray(3)}
    part = stored.Part("program", "sum", lambda: dict(values))
    stored.record([part])
    assert stored.stored_outputs(part)["count"].shape == ()
    values["x"] = np.float32([1, 2.00001])
    stored.record([part])
    assert stored.stored_outputs(part)["x"].tolist() == [1, 2]  # rounding leaves the file alone
    values["x"] = np.float32([1, 3])
    with pytest.raises(ValueError, match="unchanged version.*\n.*program/sum: x: off by up to 1"):
        stored.record([part])
    raised = stored.Part("program", "sum", part.compute, version="2")
    stored.record([raised])
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["sum.2.safetensors"]
    assert {name: x.tolist() for name, x in stored.stored_outputs(raised).items()} == {"count": 3, "x": [1, 3]}
