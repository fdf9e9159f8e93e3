"""TPU configurations: every file loads and fits its topology, bad ones say why, and a small program compiles."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megjax.tpu import TpuConfig, find_libtpu
from tests.checks import needs_libtpu

FOLDER = Path(__file__).parent.parent / "tpu_configs"
FILES = sorted(FOLDER.glob("*.json"))
TOPOLOGIES = {
    *("v4:2x2x1", "v4:2x2x4", "v5e:2x2", "v5e:2x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:4x4x2", "v6e:2x4", "v6e:16x16", "tpu7x:2x2x1"),
}


def values(**changes):
    """The content of v5e-8.json with changes, `mesh.data=2` written as mesh={"data": 2}."""
    found = json.loads((FOLDER / "v5e-8.json").read_text())
    for key, value in changes.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_load(path):
    config = TpuConfig.from_file(path)
    sizes = config.mesh.sizes(config.num_devices)
    assert sizes[0] * sizes[1] * sizes[2] == config.num_devices
    assert path.stem == f"{config.topology.partition(':')[0]}-{config.num_chips}"
    assert config.chip.name == config.topology.partition(":")[0]


def test_every_topology_has_a_file():
    assert {TpuConfig.from_file(path).topology for path in FILES} == TOPOLOGIES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, "data x fsdp x tensor is 24; it must be the number of devices, 8"),
        ({"mesh": {"rows": 3}}, "mesh: unknown setting 'rows'"),
        ({"mesh": "data"}, "mesh is 'data'; it must be an object"),
        ({"colour": 1}, "unknown setting 'colour'"),
        ({"topology": "v3:2x2"}, "topology is 'v3:2x2'"),
        ({"topology": "v5e:2x4x1"}, "it must be v5e:nxn"),
        ({"topology": "v5e:2xx4"}, "it must be v5e:nxn"),
        ({"topology": "v5e"}, "it must be v5e:nxn"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch": {"ldm": 0}}, "batch: ldm is 0"),
        ({"launch": {"hosts": 3}}, "launch: hosts x chips_per_host is 24; it must be 8"),
        ({"xla_flags": ["xla_dump"]}, "xla_flags is 'xla_dump'"),
    ],
)
def test_bad_files_say_why(tmp_path, changes, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values(**changes)))
    with pytest.raises(ValueError, match=message) as error:
        TpuConfig.from_file(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_missing_settings_and_flags(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({k: v for k, v in values().items() if k != "launch"}))
    with pytest.raises(ValueError, match="launch is None"):
        TpuConfig.from_file(path)
    config = dataclasses.replace(TpuConfig.from_file(FOLDER / "v5e-8.json"), xla_flags=("--xla_tpu_a=true",))
    assert config.compiler_options == {"xla_tpu_a": "true"}


def test_libtpu_is_found_where_make_puts_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "libtpu").is_dir()])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)
    with pytest.raises(ValueError, match="libtpu, .* is not installed; `make tpu`"):
        find_libtpu()
    (tmp_path / "libtpu" / "libtpu").mkdir(parents=True)
    importlib.invalidate_caches()
    find_libtpu()
    assert importlib.util.find_spec("libtpu").submodule_search_locations[0].startswith(str(tmp_path))


@needs_libtpu
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_libtpu_knows_every_topology(path):
    config = TpuConfig.from_file(path)
    devices = config.devices()
    assert len(devices) == config.num_devices
    assert len({tuple(device.coords) for device in devices}) == config.num_chips
    assert config.make_mesh(devices).size == config.num_devices


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know():
    config = TpuConfig.from_file(FOLDER / "v5e-8.json")
    odd = dataclasses.replace(
        config,
        topology="v5e:3x5",
        mesh=dataclasses.replace(config.mesh, data=-1, fsdp=1),
        launch=dataclasses.replace(config.launch, hosts=1, chips_per_host=15),
    )
    with pytest.raises(ValueError, match="topology v5e:3x5: .*not divisible") as error:
        odd.devices()
    assert "\n" not in str(error.value)
