"""The house: who may import whom, how large files are, what they are called, and that the front door stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmbackdoor

PACKAGE = Path(mmbackdoor.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if not {"_recipes", "_data"} & set(path.relative_to(PACKAGE).parts)
)
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SCRIPTS = sorted((ROOT / "data").glob("*.py"))

# From the ground up. A module imports from its own layer or from lower ones.
LAYERS = (
    ("types", "strict_yaml", "config_schema", "config", "entry", "seeding"),
    ("triggers", "targets", "shards", "backdoor", "backdoor_flags"),
    ("models", "objectives", "poison", "poison_clip", "poison_files"),
    ("attacks", "defenses", "detectors"),
    ("train", "evaluate", "results", "speed"),
    ("catalogue", "recipe_files", "cli"),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
# Wider than the rule for models/: the losses of open_clip are wrapped where losses live.
LIBRARIES = {"diffusers", "open_clip", "transformers", "peft"}
LIBRARY_USERS = {"objectives/contrastive.py": {"open_clip"}}
# What the distributions in pyproject.toml are imported as, where that is another name.
IMPORT_NAMES = {
    "open_clip_torch": "open_clip",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
}


def imports(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """The part of the package that each import of ours is from: `models` for `mmbackdoor.models.clip.load`."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mmbackdoor" and parts[1:] and parts[1] != "__version__":
            yield parts[1]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_its_layer():
    unplaced = {part_of(path) for path in MODULES} - set(HEIGHT) - {"__init__"}
    assert not unplaced, f"say in LAYERS where they belong: {unplaced}"


def test_imports_only_point_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in ours(path)
        if path != PACKAGE / "__init__.py" and HEIGHT.get(name, 99) > HEIGHT[part_of(path)]
    ]
    assert not wrong, wrong


def test_attacks_never_import_defenses():
    assert not [path for path in MODULES if part_of(path) == "attacks" and "defenses" in ours(path)]


def test_nothing_imports_recipes():
    assert not [
        path for path in [*MODULES, *RECIPES, *SCRIPTS] if "recipes" in {name.split(".")[0] for name in imports(path)}
    ]


def test_only_models_knows_the_model_libraries():
    for path in [*MODULES, *RECIPES, *SCRIPTS]:
        used = {name.split(".")[0] for name in imports(path)} & LIBRARIES
        if path.is_relative_to(PACKAGE / "models"):
            continue
        allowed = (
            LIBRARY_USERS.get(path.relative_to(PACKAGE).as_posix(), set()) if path.is_relative_to(PACKAGE) else set()
        )
        assert used <= allowed, f"{path} imports {used - allowed}; loading and encoding live in models/"


def test_objectives_import_torch_only():
    # Numbers, seeds and their own kind; no models, no files.
    allowed = {"objectives", "seeding", "types"}
    wrong = {path.name: set(ours(path)) - allowed for path in MODULES if part_of(path) == "objectives"}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("path", [*MODULES, *RECIPES, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_small_well_named_and_documented(path):
    lines = path.read_text().count("\n")
    most = 160 if path in RECIPES else 400
    assert lines <= most, f"{path.name} has {lines} lines; {most} at most"
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, f"{path} does not say what it is for"


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = [re.match(r"[\w-]+", text)[0] for text in wanted]
    declared = {IMPORT_NAMES.get(name, name) for name in names} | {"mmbackdoor"}
    used = {name.split(".")[0] for path in [*MODULES, *RECIPES, *SCRIPTS] for name in imports(path)}
    undeclared = used - declared - sys.stdlib_module_names
    assert not undeclared, undeclared


@pytest.mark.parametrize(
    "module", ["mmbackdoor", "mmbackdoor.cli", "mmbackdoor.entry", "mmbackdoor.targets", "mmbackdoor.triggers"]
)
def test_importing_it_loads_no_torch(module):
    heavy = ("torch", "diffusers", "open_clip", "transformers", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
