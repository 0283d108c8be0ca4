"""YAML as configs need it: plain data only. No tags, anchors, merges or repeated keys, a bounded size and depth;
numbers as in JSON, so that `1e-4` is a number, `010` is ten, and `yes`, `1:30` and `2024-01-01` are texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mmbackdoor.types import InputError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12

# 18 digits fit a signed 64-bit integer; longer ones stay text and fail as "not an integer".
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}$")
_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,5})?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NOTHING = re.compile(r"(?:~|null|Null|NULL|)$")


def scalar(text: str) -> bool | int | float | str:
    """What `text` reads as: true or false, a number, or itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if _NUMBER.match(text) else text


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str | None, list[Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not read", problem_mark=event.start_mark
            )
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags ({event.tag}) are not read", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a text", problem_mark=key_node.start_mark)
            if key in mapping:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or our reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in (
    ("null", _NOTHING),
    ("bool", re.compile("(?:" + "|".join(_WORDS) + ")$")),
    ("int", _INTEGER),
    ("float", _NUMBER),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
for _tag in ("bool", "int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda loader, node: scalar(node.value))


def read(path: Path) -> dict[str, Any]:
    """The mapping in the file; {} where it is empty. Raises `InputError` for everything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"--config {str(path)!r} cannot be read ({error.strerror}); give a YAML file") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"--config {str(path)!r} is larger than {MAX_BYTES // 1024} KiB; give a YAML file of settings")
    try:
        values = yaml.load(content.decode("utf-8-sig"), Loader=_Loader)  # noqa: S506  (a SafeLoader, made stricter)
    except UnicodeDecodeError as error:
        raise InputError(f"--config {str(path)!r} is not UTF-8 text; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(
            f"--config {str(path)!r} is not the YAML that is read here ({place}{error.problem}); mend that line"
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--config {str(path)!r} is not YAML ({reason}); give a text file of `key: value` lines"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"--config {str(path)!r} holds {type(values).__name__}, not `key: value` lines; write one key a line"
        )
    return values


def write(values: dict[str, Any]) -> str:
    """`values` as YAML in ASCII that `read` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, default_flow_style=False, width=120)
