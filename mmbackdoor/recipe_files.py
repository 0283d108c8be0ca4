"""Where the recipes, their configs and the data scripts are: in the checkout, or inside an installed wheel."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mmbackdoor.config import parse
from mmbackdoor.config_schema import closest, is_main_process
from mmbackdoor.types import InputError

Config = TypeVar("Config")
_PACKAGE = Path(__file__).parent
# What a reader needs; a checkout may hold shards and caches beside it.
_SUFFIXES = {".py", ".yaml", ".md", ".txt", ".csv", ".jsonl", ".json"}


def folders() -> dict[str, Path]:
    """The folders `recipes` and `data`."""
    packed = {"recipes": _PACKAGE / "_recipes", "data": _PACKAGE / "_data"}
    return {name: path if path.is_dir() else _PACKAGE.parent / name for name, path in packed.items()}


def recipe_names() -> list[str]:
    return sorted(path.stem for path in folders()["recipes"].glob("*.py"))


def recipe_of(config: Path) -> str:
    """The recipe that a config file belongs to: `<recipe>/<case>.yaml` or `smoke/<recipe>.yaml`."""
    config = config.absolute()
    name = config.stem if config.parent.name == "smoke" else config.parent.name
    if name not in recipe_names():
        known = ", ".join(recipe_names())
        raise InputError(f"{str(config)!r} does not say which recipe it is for; give --recipe with one of {known}")
    return name


def load(name: str) -> ModuleType:
    """The recipe's module. Raises `InputError` for a name that is none."""
    known = recipe_names()
    if name not in known:
        raise InputError(f"--recipe {name!r} is unknown{closest(name, known)}; choose one of {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"mmbackdoor_recipe_{name}", folders()["recipes"] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their annotations up in the module of that name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def validate(name: str, argv: list[str]) -> None:
    """Read `argv` as the recipe would. Raises its `InputError`."""
    config_type = vars(load(name)).get("Config")
    if config_type is None or not dataclasses.is_dataclass(config_type):
        raise InputError(f"recipe {name} has no settings of its own (no class Config); there is nothing to check")
    parse(config_type, argv)


def flags(settings: Mapping[str, Any]) -> list[str]:
    """`settings` (dotted key -> value) as a command line has them."""
    found = []
    for key, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        found += [f"--{key}", *("none" if one is None else str(one) for one in values)]
    return found


def words(recipe: str, settings: Mapping[str, Any]) -> list[str]:
    """`settings` as the recipe's command line has them; `config` is a file, or the name of one of the recipe's own."""
    file = settings.get("config")
    if file is not None and not str(file).endswith(".yaml"):
        file = folders()["recipes"] / "configs" / recipe / f"{file}.yaml"
    return flags(({} if file is None else {"config": file}) | {k: v for k, v in settings.items() if k != "config"})


def stage(recipe: str, *flags: object) -> None:
    """Run a recipe in this process, and say by which command it can be run alone."""
    arguments = [str(flag) for flag in flags]
    if is_main_process():
        print(f"\n$ accelerate launch -q recipes/{recipe}.py {shlex.join(arguments)}", flush=True)
    module = load(recipe)
    module.run(parse(module.Config, arguments))
    # A model prepared for mixed precision refers to itself: it would stay on the device beside the next one.
    gc.collect()


def stage_of(recipe: str, settings: Mapping[str, Any]) -> None:
    """`stage` with `settings` as `words` reads them."""
    stage(recipe, *words(recipe, settings))


def job(settings: Mapping[str, Path], recipe: str, wanted: Mapping[str, Any]) -> None:
    """Run a recipe as `stage` does: with the file that `settings` has for it, if any, and what is `wanted` on top."""
    file = {"config": settings[recipe]} if recipe in settings else {}
    stage(recipe, *flags(file | wanted))


def settings_of(config_type: type[Config], output_dir: str) -> Config:
    """The settings of the run that wrote to `output_dir`. Raises `InputError` where there is none, or another."""
    file = Path(output_dir) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{output_dir!r} has no config.yaml, so no run has finished there; give another --output_dir")
    return parse(config_type, ["--config", str(file)])


def copy_out(folder: Path, *, force: bool = False) -> list[Path]:
    """Copy both folders into `folder`. Raises `InputError`, before anything is written, for a file that is there."""
    copies = {}
    for name, source in folders().items():
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
                copies[folder / name / path.relative_to(source)] = path
    there = [str(path) for path in copies if path.exists()]
    if there and not force:
        raise InputError(
            f"{len(there)} files are there already, such as {there[0]!r}; "
            "give another folder, or --force to overwrite them"
        )
    for path, source in copies.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            shutil.copyfile(source, part)
            part.replace(path)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{str(path)!r} cannot be written ({error.strerror}); give a folder that can") from error
    return list(copies)
