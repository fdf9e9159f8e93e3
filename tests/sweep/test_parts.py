"""Tests of users' own laws, codecs and policies in a sweep: found by import path, told apart by what they are."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.channel import FADINGS
from megjax.sweep.identity import object_digest, part_identity, sweep_fading, sweep_policy

MODULE = '''
import dataclasses
from typing import ClassVar
import jax
import jax.numpy as jnp
from megjax.codec import link
from megjax.pytrees import pytree_dataclass


class Fixed:
    """No pytree."""

    dependence: ClassVar[str] = "independent"

    def __init__(self, gain=1.0):
        self.gain = gain

    def sample(self, key, num_blocks):
        return self.gain * jnp.ones(num_blocks, jnp.complex64)


@dataclasses.dataclass
class Unhashable(Fixed):
    gain: float = 1.0


@pytree_dataclass
class First:
    """All power on the first block."""

    causal: ClassVar[bool] = True

    def allocate(self, gains, problem):
        return jnp.where(jnp.arange(gains.shape[0]) == 0, problem.energy, 0.0)


class Plain:
    """The numbers of the latent as they are."""

    def spending(self, snr_db, num_symbols, num_blocks, mapping):
        return link.spending(jnp.ones(64), num_symbols, num_blocks, mapping)

    def encode(self, latents, snr_db, num_symbols):
        return latents.reshape(len(latents), -1)

    def decode(self, received, snr_db, num_symbols):
        return received.estimate.reshape(-1, 4, 4, 4)


class Half:
    """Lacks two methods."""

    def encode(self, latents, snr_db, num_symbols):
        return latents


strong = Fixed(2.0)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write the module `own_parts` and forget the last version of it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text=MODULE):
        (folder / "own_parts.py").write_text(text)
        sys.modules.pop("own_parts", None)
        importlib.invalidate_caches()

    write()
    yield write
    sys.modules.pop("own_parts", None)


def test_own_parts_in_a_sweep(sweep, own, tmp_path):
    changes = dict(schemes=("seed",), rates=(1.0,), codec="own_parts:Plain", policies=("equal",), snr_db=(0.0,))
    laws = ("own_parts:Fixed", "own_parts:Unhashable", "awgn")
    frame = sweep(tmp_path / "laws", fadings=laws, **changes)
    assert frame.fading.tolist() == list(laws)
    np.testing.assert_allclose(frame.nmse, frame.nmse[2], rtol=1e-5)
    policies = ("equal", "own_parts:First")
    frame = sweep(tmp_path / "policies", fadings=("awgn",), **{**changes, "policies": policies})
    assert abs(frame.nmse[1] - frame.nmse[0]) > 0.1  # three of four blocks are lost, and their noise with them
    np.testing.assert_allclose(frame.mean_power, 1.0, rtol=1e-5)


def test_changed_parts_are_measured_anew(sweep, own, tmp_path):
    changes = dict(schemes=("latent",), policies=("equal",), snr_db=(0.0,), fadings=("own_parts:Fixed", "awgn"))
    measured = []
    first = sweep(tmp_path, on_point=measured.append, **changes)
    sweep(tmp_path, on_point=measured.append, **changes)
    assert len(measured) == 2
    own(MODULE.replace("return self.gain", "return 3 * self.gain"))
    second = sweep(tmp_path, on_point=measured.append, **changes)
    assert [point.fading for point in measured[2:]] == ["own_parts:Fixed"]
    assert second.nmse[0] < first.nmse[0] and second.nmse[1] == first.nmse[1]


def test_digests_see_attributes_and_module_but_no_addresses(own):
    name = "own_parts:Fixed"
    law = sweep_fading(name)
    marks = {object_digest(name, law), object_digest(name, type(law)())}
    assert len(marks) == 1
    marks |= {object_digest(name, type(law)(2.0)), object_digest(name, type(law)(jnp.ones(2)))}
    marks |= {object_digest(name, type(law)({"gain": [np.float32(2.0)]})), object_digest(name, type(law)(np.ones(2)))}
    assert len(marks) == 5
    own(MODULE + "\n# another text\n")
    assert object_digest(name, sweep_fading(name)) not in marks
    loop = type(law)()
    loop.gain = [loop]
    assert object_digest(name, loop)


def test_registered_parts_are_told_apart_by_version_and_arrays():
    three, four = (part_identity(FADINGS, "rician:3", sweep_fading(f"rician:{k}")) for k in (3, 4))
    assert three[:2] == four[:2] == ["rician:3", 1] and three[2] != four[2]
    assert part_identity(FADINGS, "rayleigh", sweep_fading("rayleigh"))[:2] == ["rayleigh", 1]


def test_one_object_for_all_points(own):
    assert sweep_fading("own_parts:Fixed") is sweep_fading("own_parts:Fixed")
    assert sweep_fading("own_parts:strong").gain == 2.0
    assert sweep_policy("own_parts:First") is sweep_policy("own_parts:First")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "own_parts:Half"}, "codec is .*with methods spending, encode and decode"),
        ({"codec": "own_parts:Fixed"}, "codec is 'own_parts:Fixed'; it must be an object with a method 'encode'"),
        (
            {"codec": "own_parts:Plain", "schemes": ("latent-wiener",)},
            "codec is .*SeedCodec for scheme 'latent-w",
        ),
        ({"codec": "own_parts:Plain", "schemes": ("opta",)}, "codec is .*; it must be a SeedCodec"),
        ({"policies": ("own_parts:Fixed",)}, "it must be an object with a method 'allocate'"),
        pytest.param({"policies": ("static",), "fadings": ("own_parts:Fixed",)}, "", marks=pytest.mark.slow),
    ],
)
def test_own_parts_that_do_not_fit(sweep, own, unchecked, tmp_path, change, message):
    if message:
        with pytest.raises(ValueError, match=message) as error:
            sweep(tmp_path, **change)
        assert "\n" not in str(error.value) and list(tmp_path.rglob("*.parquet")) == []
    else:
        assert len(sweep(tmp_path, **change, schemes=("seed",), snr_db=(0.0,))) == 1
