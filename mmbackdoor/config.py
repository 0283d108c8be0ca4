"""Settings: a frozen dataclass from a YAML file and flags, or one sentence that says what is wrong.

The dataclass is the only description. A field whose type is a dataclass is a section (`--train.learning_rate`, or a
mapping in YAML); a field whose type is a union of dataclasses, each with `name: Literal["x"]`, is a choice
(`--defense x`); every other field is a value that pydantic checks strictly. On the class of the whole,
`UNDOTTED: ClassVar[tuple[str, ...]]` names the sections whose keys are read without the section too (without it:
`model` and `train`) and `ALIASES: ClassVar[dict[str, str]]` gives further names (`{"lr": "train.learning_rate"}`). On
the class of a section, `GIVES_WAY: ClassVar[dict[str, str]]` names keys that become none where another one is given and
they are a mere default, or where it is a flag and they are in the file (`{"max_train_steps": "num_train_epochs"}`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mmbackdoor import config_schema, strict_yaml
from mmbackdoor.config_schema import Doc, Escaped, Leaf, Section, closest, fields_of, short
from mmbackdoor.types import InputError

__all__ = ["Doc", "Escaped", "changed", "config_sha256", "from_values", "parse", "to_yaml"]

Config = TypeVar("Config")
Tree = dict[str, Any]


@dataclass(frozen=True)
class _Given:
    """A value as the user gave it: under `key`, in `file` (plain data) or as a flag (a list of texts)."""

    key: str
    value: Any
    file: str | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return f"{self.key}: {short(self.value)} (in {self.file})"
        return (
            " ".join([f"--{self.key}", *(short(text) for text in self.value)])
            if isinstance(self.value, list)
            else f"--{self.key}"
        )

    @property
    def single(self) -> Any:
        """The one value, where a name or nothing else is meant."""
        if self.file is not None or not isinstance(self.value, list):
            return self.value
        return self.value[0] if len(self.value) == 1 else self.value

    @property
    def is_none(self) -> bool:
        return self.single is None or (self.file is None and self.single in ("none", "None"))


def parse(config_type: type[Config], argv: list[str] | None = None, *, doc: str = "") -> Config:
    """The settings that `argv` (without the program; by default the command line's) gives.

    `--config FILE` is read first, flags override it; of a flag given twice the last counts, but a list grows. `--help`
    prints every key and exits. Raises `InputError`, with one sentence, for everything that is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        if config_schema.is_main_process():
            print(config_schema.describe_all(config_type, doc))
        raise SystemExit(0)
    config_file, flags = None, []
    for given in _flags(argv):
        if given.key != "config":
            flags.append(given)
        elif config_file is not None or not isinstance(given.single, str):
            raise InputError(f"{given} is not possible: give --config once, with one YAML file")
        else:
            config_file = Path(given.single)
    tree = {} if config_file is None else _tree(config_type, strict_yaml.read(config_file), str(config_file))
    _insert_flags(tree, config_type, flags)
    return _build(config_type, tree, "", None)


def changed(config: Config, argv: list[str]) -> Config:
    """What `config` as a file, and the flags `argv` on top of it, give. Raises `InputError` as `parse` does."""
    tree = _tree(type(config), _plain(config), "the settings")
    _insert_flags(tree, type(config), _flags(argv))
    return _build(type(config), tree, "", None)


def _insert_flags(tree: Tree, config_type: type, flags: list[_Given]) -> None:
    for given in flags:
        path = _route(config_type, given.key)
        if path[0] not in fields_of(config_type) and given.key.startswith(("no_", "no-")) and not given.value:
            switch = _route(config_type, given.key[3:])
            if switch[0] in fields_of(config_type):
                path, given = switch, dataclasses.replace(given, value=False)
        _insert(tree, [config_type], path, given)


def from_values(config_type: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """The settings that plain `values`, as read from the file `source`, give. Raises `InputError` as `parse` does."""
    return _build(config_type, _tree(config_type, values, source), "", None)


def _tree(config_type: type, values: Mapping[str, Any], source: str) -> Tree:
    tree: Tree = {}
    for key, value in values.items():
        _insert(tree, [config_type], _route(config_type, key), _Given(key, value, source))
    return tree


def to_yaml(config: Any) -> str:
    """The whole configuration, every key spelt out; `parse` reads it back as the same."""
    return strict_yaml.write(_plain(config))


def config_sha256(config: Any) -> str:
    """A name for this configuration: the same for the same values, however they were given."""
    return hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    values = {}
    for name, field in fields_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(field.node, Section):
            values[name] = None if value is None else _plain(value)
        else:
            plain = field.node.adapter.dump_python(value, mode="json")
            values[name] = _each_text(plain, lambda text: text.replace("\\", "\\\\")) if field.node.escaped else plain
    # The name of a choice comes first: it decides what the other keys mean.
    return {"name": values["name"], **values} if config_schema.choice_name(type(config)) else values


def _flags(argv: list[str]) -> list[_Given]:
    """`--key value ...` and `--key=value`, in order. Only `--` starts a flag, so negative numbers are values."""
    found: list[_Given] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            found.append(_Given(key, [value] if equals else []))
        elif not found:
            raise InputError(f"{short(word)} stands before any flag; write --KEY {short(word)}")
        else:
            found[-1].value.append(word)
    return found


def _route(config_type: type, key: str) -> list[str]:
    """The full path of `key`, with aliases and left out sections put in. Unknown keys come back as they are."""
    aliases = {name.replace("-", "_"): path for name, path in config_schema.aliases(config_type).items()}
    key = key.replace("-", "_")
    first, *rest = aliases.get(key, key).split(".")
    if first not in fields_of(config_type):
        for section in config_schema.undotted(config_type):
            if first in fields_of(section.classes[0]):
                return [section.name, first, *rest]
    return [first, *rest]


def _insert(tree: Tree, owners: list[type], path: list[str], given: _Given) -> None:
    """Put `given` into `tree` at `path`. Within a choice `owners` are all its classes; which counts is seen later."""
    name, *rest = path
    nodes = [fields_of(owner)[name].node for owner in owners if name in fields_of(owner)]
    if not nodes:
        raise InputError(_unknown(name, owners, given))
    sections = [node for node in nodes if isinstance(node, Section)]
    classes = [kind for section in sections for kind in section.classes]
    if not classes:
        if rest:
            raise InputError(f"{given} is not possible: {name} is a value and has no keys; give --{name} VALUE")
        before = tree.get(name)
        if given.file is not None and before is not None:
            raise InputError(f"{given} says again what `{before.key}` says; keep one of the two")
        if before is not None and before.file is None and nodes[0].is_list and before.value and given.value:
            given = _Given(given.key, [*before.value, *given.value])
        tree[name] = given
        return
    if not rest and given.is_none and sections[0].optional:
        tree[name] = given
        return
    branch = tree.setdefault(name, {})
    if isinstance(branch, _Given):
        branch = tree[name] = {}
    if rest:
        _insert(branch, classes, rest, given)
    elif given.file is not None and isinstance(given.value, dict):
        for key, value in given.value.items():
            _insert(branch, classes, key.replace("-", "_").split("."), _Given(f"{given.key}.{key}", value, given.file))
    elif sections[0].is_choice:
        _insert(branch, classes, ["name"], given)
    elif name in fields_of(classes[0]):
        # CLIP recipes have a section `model` with a key `model`: `--model ViT-B-32` means that.
        _insert(branch, classes, [name], given)
    else:
        keys = ", ".join(fields_of(classes[0]))
        raise InputError(
            f"{given} is not possible: {name} is a section; give its keys as --{name}.KEY VALUE, with KEY one of {keys}"
        )


def _unknown(name: str, owners: list[type], given: _Given) -> str:
    whole = config_schema.flag_names(owners[0]) if len(owners) == 1 else []
    known = sorted({*whole, *(key for owner in owners for key in fields_of(owner))})
    return f"{given} is not possible: unknown key {short(name)}{closest(name, known)}; the keys are {', '.join(known)}"


def _build(kind: type[Config], tree: Tree, prefix: str, default: Config | None) -> Config:
    """A `kind` with the values of `tree`; the others are those of `default`, or the class's own."""
    values = {}
    for name, field in fields_of(kind).items():
        fallback = field.default() if default is None else getattr(default, name)
        if isinstance(field.node, Section):
            if name in tree or fallback is dataclasses.MISSING:
                values[name] = _section(field.node, tree.get(name, {}), prefix + name, fallback)
        elif name in tree:
            values[name] = _leaf(field.node, tree[name])
        elif fallback is dataclasses.MISSING:
            raise InputError(
                f"{prefix}{name} is missing and has no default; give --{prefix}{name} with {field.node.wanted}"
            )
    for name, other in getattr(kind, "GIVES_WAY", {}).items():
        if other in tree and not tree[other].is_none and _nearness(tree[other]) > _nearness(tree.get(name)):
            values[name] = None
    return kind(**values) if default is None else dataclasses.replace(default, **values)


def _nearness(given: _Given | None) -> int:
    """Of a default 0, of a file's value 1, of a flag's 2."""
    return 0 if given is None else 1 if given.file is not None else 2


def _section(node: Section, tree: Tree | _Given, key: str, fallback: Any) -> Any:
    if isinstance(tree, _Given):
        return None
    default = None if fallback is dataclasses.MISSING else fallback
    if not node.is_choice:
        return _build(node.classes[0], tree, f"{key}.", default)
    kinds = {config_schema.choice_name(kind): kind for kind in node.classes}
    given = tree.get("name")
    if given is None and default is None:
        raise InputError(f"{key} is missing and has no default; give --{key} with one of {', '.join(kinds)}")
    name = config_schema.choice_name(type(default)) if given is None else given.single
    if not isinstance(name, str) or name not in kinds:
        raise InputError(
            f"{given} is not possible: unknown {key} {short(name)}{closest(name, kinds)}; "
            f"choose one of {', '.join(kinds)}"
        )
    kind = kinds[name]
    kept = {}
    for child, value in tree.items():
        if child in fields_of(kind):
            kept[child] = value
            continue
        # A name given as a flag on top of a file that describes another choice: what does not apply is left behind.
        foreign = next(
            (part for part in _leaves(value) if part.file is None or given is None or given.file is not None), None
        )
        if foreign is not None:
            owners = ", ".join(other for other, cls in kinds.items() if child in fields_of(cls))
            own = ", ".join(field for field in fields_of(kind) if field != "name") or "none"
            raise InputError(
                f"{foreign} is not possible: {child} belongs to {key} {owners}, not to {name!r}, whose keys are {own}"
            )
    kept.pop("name", None)
    return _build(kind, kept, f"{key}.", default if type(default) is kind else None)


def _leaves(tree: Tree | _Given) -> list[_Given]:
    return [tree] if isinstance(tree, _Given) else [leaf for branch in tree.values() for leaf in _leaves(branch)]


def _leaf(leaf: Leaf, given: _Given) -> Any:
    """The checked value. A flag's text may be read as a number or a truth value, whichever the field takes."""
    if given.file is not None or not isinstance(given.value, list):
        readings = [given.value]
    elif not given.value:
        readings = [True]
    elif leaf.is_list:
        readings = [None] if given.is_none and leaf.is_optional else []
        readings += [[strict_yaml.scalar(text) for text in given.value], given.value]
    elif len(given.value) > 1:
        raise InputError(f"{given} is not possible: {given.key} takes one value; give {leaf.wanted}")
    else:
        readings = [None] if given.is_none and leaf.is_optional else []
        readings += [strict_yaml.scalar(given.value[0]), given.value[0]]
    reason = ""
    for reading in readings:
        try:
            value = leaf.adapter.validate_json(
                json.dumps(_unescape(reading, given) if leaf.escaped else reading), strict=True
            )
        except ValidationError as error:
            first = error.errors()[0]
            reason = f" ({first['msg']})" if first["type"] in ("value_error", "assertion_error") else ""
            continue
        if not _finite(value):
            raise InputError(f"{given} is not possible: the number must be finite; give {leaf.wanted}")
        return value
    if given.value is False and given.file is None:
        raise InputError(
            f"{given} is not possible: only a key that is true or false has it; "
            f"give --{given.key[3:]} with {leaf.wanted}"
        )
    if given.value == [] and given.file is None:
        raise InputError(f"{given} has no value; give --{given.key} with {leaf.wanted}")
    raise InputError(f"{given} is not possible{reason}: give {leaf.wanted}{closest(given.single, leaf.choices)}")


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _each_text(value: Any, change: Any) -> Any:
    if isinstance(value, list):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _unescape(value: Any, given: _Given) -> Any:
    return _each_text(value, lambda text: config_schema.unescape(text, str(given)))
