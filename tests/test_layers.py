"""Tests of the library's structure: which module imports which, how long files are, and what importing loads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Part of the library -> layer. A part is a module or a whole package; anything not listed fails the test.
LAYERS = {
    "assets": 0,
    "processes": 0,
    "pytrees": 0,
    "runtime": 0,
    "registry": 0,
    "units": 0,
    "files": 0,
    "numerics": 0,
    "configs": 0,
    "keys": 0,
    "sharding": 0,
    "termination": 0,
    "hlo": 0,
    "runs": 0,
    "tables": 0,
    "precision": 0,
    "data.__init__": 0,
    "data.scenes": 0,
    "data.scene_shapes": 0,
    "cost": 1,
    "training": 1,
    "channel": 1,
    "diffusion": 1,
    "data.latents": 2,
    "codec": 2,
    "metrics": 2,
    "power": 2,
    "tpu": 2,
    "system": 3,
    "ldm": 4,
    "sweep": 4,
    "__init__": 5,
}
# Edges beyond "any lower layer": inside layer 0, and for layer 2, which sees layer 1 only along its arrows.
ARROWS = {
    "runtime": {"configs", "processes", "sharding"},
    "sharding": {"configs", "processes"},
    "keys": {"configs"},
    "configs": {"files"},
    "runs": {"configs", "files", "processes"},
    "tables": {"files"},
    "registry": {"configs"},
    "data.scenes": {"data.__init__", "data.scene_shapes", "keys"},
    "data.scene_shapes": {"data.__init__", "precision"},
    "data.latents": {"diffusion"},
    "codec": {"channel", "training"},
    "metrics": {"diffusion"},
    "power": {"channel", "training"},
    "tpu": {"cost"},
}
MAX_LINES = {"megjax": 400, "train": 150, "eval": 400, "tests": 400}


def module_name(path):
    """Name below megjax: `channel.fading`, `channel.__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path) for path in FILES}


def part_of(module):
    """The part of LAYERS that holds a module, or None."""
    return next((part for part in LAYERS if module == part or module.startswith(part + ".")), None)


def allowed(part, target):
    if part == target:
        return True
    lower = LAYERS[target] < (1 if LAYERS[part] == 2 else LAYERS[part])
    return lower or target in ARROWS.get(part, ())


def absolute_names(node, module):
    """Dotted names that an import statement may refer to, absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parents = ["megjax", *module.split(".")]
    prefix = parents[: len(parents) - node.level] if node.level else []
    base = ".".join([*prefix, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imported_modules(source, module, modules):
    """Modules of megjax that a source file imports, at any depth; a name that is no module counts as its package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in absolute_names(node, module):
                head, *parts = name.split(".")
                if head == "megjax":
                    found.add(resolve(parts, modules))
    return found


def resolve(parts, modules):
    """Longest prefix of `parts` that is a module or a package."""
    for end in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in modules:
                return candidate
    return "__init__"


def violations(source, module, modules):
    part = part_of(module)
    if part is None:
        return [f"{module} is in no layer"]
    targets = sorted(imported_modules(source, module, modules))
    return [
        f"{module} imports {target}" for target in targets if not (part_of(target) and allowed(part, part_of(target)))
    ]


def test_imports_follow_the_layers():
    assert [edge for path in FILES for edge in violations(path.read_text(), module_name(path), MODULES)] == []


@pytest.mark.parametrize(
    ("module", "source", "edges"),
    [
        ("channel.fading", "from megjax import units", []),
        ("channel.fading", "from megjax.units import db_to_linear", []),
        ("channel.fading", "from . import packing\nfrom .packing import pack", []),
        ("channel.fading", "from ..codec import klt", ["channel.fading imports codec.__init__"]),
        ("channel.fading", "def f():\n    import megjax.diffusion", ["channel.fading imports diffusion.__init__"]),
        ("units", "import megjax", ["units imports __init__"]),
        ("units", "from megjax import configs", ["units imports configs"]),
        ("power.env", "from megjax.channel import transmit", []),
        ("power.env", "from megjax import system", ["power.env imports system"]),
        ("codec.klt", "from megjax.diffusion import vae", ["codec.klt imports diffusion.__init__"]),
        ("metrics.image", "from megjax.diffusion import vae", []),
        ("system", "from megjax.power import env\nfrom megjax.data import scenes", []),
        ("system", "from megjax import sweep", ["system imports sweep"]),
        ("helpers", "", ["helpers is in no layer"]),
        ("data.loader", "", ["data.loader is in no layer"]),
    ],
)
def test_the_layer_check_itself(module, source, edges):
    packages = ("channel", "codec", "diffusion", "power", "metrics", "data")
    modules = {"__init__", "units", "configs", "system", "sweep", "data.scenes", "channel.packing", "power.env"}
    assert violations(source, module, modules | {f"{package}.__init__" for package in packages}) == edges


def test_assets_hold_no_code():
    assert not list((PACKAGE / "assets").rglob("*.py"))


def test_files_are_short():
    for folder, longest in MAX_LINES.items():
        lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
        assert {path: length for path, length in lengths.items() if length > longest} == {}


def test_only_units_takes_logarithms_to_base_10():
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {getattr(node, field, None) for node in nodes for field in ("attr", "id", "name")}
        assert "log10" not in names or module_name(path) == "units", path


def test_only_sharding_makes_meshes():
    for path in (*FILES, *(ROOT / "eval").rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = any(getattr(call, "id", getattr(call, "attr", None)) == "Mesh" for call in calls)
        assert not made or path.stem == "sharding", path
