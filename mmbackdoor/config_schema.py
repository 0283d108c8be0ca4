"""What a configuration dataclass says about itself: its keys, their types in words, and the text of `--help`."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter

from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Doc:
    """The help text of a key: `steps: Annotated[int, Doc("how many steps")] = 100`."""

    text: str


@dataclass(frozen=True)
class _Escaped:
    pass


Escaped = _Escaped()
r"""Marks a text in which `\u200b`, `\U0001f600`, `\x41`, `\n`, `\t` and `\\` are read: `Annotated[str, Escaped]`."""

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|n|t|\\)")


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value. `annotation` is its type, with pydantic's constraints."""

    annotation: Any
    escaped: bool

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation)

    @cached_property
    def _schemas(self) -> list[dict[str, Any]]:
        schema = self.adapter.json_schema(mode="validation")
        return schema.get("anyOf", [schema])

    @property
    def is_list(self) -> bool:
        return any(schema.get("type") == "array" for schema in self._schemas)

    @property
    def is_optional(self) -> bool:
        return any(schema.get("type") == "null" for schema in self._schemas)

    @property
    def choices(self) -> list[str]:
        return [str(choice) for schema in self._schemas for choice in _item_choices(schema)]

    @cached_property
    def wanted(self) -> str:
        """What the key takes, in words: `an integer >= 1`, `one of mse, l1`, `a text or none`."""
        return " or ".join(map(_words, self._schemas))


@dataclass(frozen=True)
class Section:
    """A key that holds a dataclass: the one of `classes`, or the chosen one where they carry names."""

    name: str
    classes: tuple[type, ...]
    optional: bool

    @property
    def is_choice(self) -> bool:
        return choice_name(self.classes[0]) is not None


@dataclass(frozen=True)
class Key:
    node: Leaf | Section
    doc: str
    field: dataclasses.Field[Any]

    def default(self) -> Any:
        """A fresh default, or `dataclasses.MISSING`."""
        return self.field.default if self.field.default_factory is dataclasses.MISSING else self.field.default_factory()


@cache
def fields_of(kind: type) -> dict[str, Key]:
    """The keys of a configuration class, in order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    keys = {}
    for field in dataclasses.fields(kind):
        if field.init:
            keys[field.name] = Key(_node(field.name, hints[field.name]), _doc(hints[field.name]), field)
    return keys


@cache
def choice_name(kind: type) -> str | None:
    """The `x` of a class with `name: Literal["x"]`; None for a class that is no choice."""
    hint = typing.get_type_hints(kind).get("name")
    return get_args(hint)[0] if get_origin(hint) is Literal and len(get_args(hint)) == 1 else None


def undotted(config_type: type) -> list[Section]:
    """The sections whose keys may be written without the section."""
    names = getattr(config_type, "UNDOTTED", ("model", "train"))
    nodes = [fields_of(config_type)[name].node for name in names if name in fields_of(config_type)]
    return [node for node in nodes if isinstance(node, Section) and not node.is_choice]


def aliases(config_type: type) -> dict[str, str]:
    return getattr(config_type, "ALIASES", {})


def flag_names(config_type: type) -> list[str]:
    """Every name that a flag of `config_type` may have at its top."""
    inner = [key for section in undotted(config_type) for key in fields_of(section.classes[0])]
    return [*fields_of(config_type), *inner, *aliases(config_type)]


def is_main_process() -> bool:
    """Whether this process is the one that prints: rank 0, or the only one."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) in ("0", "")


def short(value: Any) -> str:
    """`repr(value)` in one line of at most 80 characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-16:]


def closest(given: Any, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where `given` is close to one of `known`."""
    found = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6) if isinstance(given, str) else []
    return f" (did you mean {found[0]!r}?)" if found else ""


def unescape(text: str, where: str) -> str:
    def read(match: re.Match[str]) -> str:
        code = match[1]
        if code in ("n", "t", "\\"):
            return {"n": "\n", "t": "\t", "\\": "\\"}[code]
        number = int(code[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise InputError(
                f"{where} is not possible: {match[0]} is no character; write \\uXXXX with a character's code"
            )
        return chr(number)

    return _ESCAPE.sub(read, text)


def describe_all(config_type: type, doc: str) -> str:
    """The text of `--help`."""
    short_sections = {section.name for section in undotted(config_type)}
    lines = [
        doc.strip(),
        "",
        "Keys, as flags or in --config FILE (YAML). Flags override the file; - and _ are the same.",
        "",
    ]
    lines += _describe(config_type, "", short_sections)
    if aliases(config_type):
        lines += [
            "",
            "Other names: " + ", ".join(f"--{name} for --{path}" for name, path in aliases(config_type).items()),
        ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _describe(kind: type, prefix: str, short_sections: set[str], default: Any = None) -> list[str]:
    lines = []
    for name, key in fields_of(kind).items():
        value = key.default() if default is None else getattr(default, name)
        if isinstance(key.node, Section):
            names = [choice_name(cls) for cls in key.node.classes] if key.node.is_choice else []
            about = key.doc or (_first_line(key.node.classes[0]) if not names else "")
            if names:
                chosen = "" if value in (None, dataclasses.MISSING) else f" (default {choice_name(type(value))})"
                lines += ["", f"--{prefix}{name}  one of {', '.join(map(str, names))}{chosen}  {about}".rstrip()]
            else:
                lines += ["", f"{prefix}{name}: {about}".rstrip()]
            for cls in key.node.classes:
                if names:
                    lines.append(f"  {prefix}{name} {choice_name(cls)}: {_first_line(cls)}")
                base = value if isinstance(value, cls) else None
                below = "" if not prefix and name in short_sections else f"{prefix}{name}."
                lines += [f"  {line}".rstrip() for line in _describe(cls, below, set(), base)]
            lines.append("")
        elif not (name == "name" and choice_name(kind)):
            shown = "required" if value is dataclasses.MISSING else f"default {_shown(value)}"
            lines.append(f"  --{prefix}{name}  {key.node.wanted} ({shown})  {key.doc}".rstrip())
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return short(str(value) if isinstance(value, os.PathLike) else value)


def _first_line(kind: type) -> str:
    doc = (kind.__doc__ or "").strip()
    return (
        ""
        if doc.startswith(kind.__name__ + "(")
        else re.split(r"(?<!\bal)(?<!\beq)[.;] ", " ".join(doc.split("\n\n")[0].split()))[0]
    )


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _node(name: str, annotation: Any) -> Leaf | Section:
    members = _members(annotation)
    classes = tuple(member for member in members if member is not type(None))
    if classes and all(isinstance(member, type) and dataclasses.is_dataclass(member) for member in classes):
        if len(classes) > 1 and not all(map(choice_name, classes)):
            raise TypeError(f'{name}: each class of a union needs `name: Literal["..."]`')
        return Section(name, classes, optional=len(classes) < len(members))
    return Leaf(annotation, _is_escaped(annotation))


def _is_escaped(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated and Escaped in annotation.__metadata__:
        return True
    return any(_is_escaped(part) for part in get_args(annotation) if part is not Ellipsis and not isinstance(part, str))


def _doc(annotation: Any) -> str:
    if get_origin(annotation) is not Annotated:
        return ""
    return " ".join(note.text for note in annotation.__metadata__ if isinstance(note, Doc))


def _choices(schema: dict[str, Any]) -> list[Any]:
    return schema.get("enum", [schema["const"]] if "const" in schema else [])


def _item_choices(schema: dict[str, Any]) -> list[Any]:
    return _choices(schema) or _choices(schema.get("items") or {})


def _words(schema: dict[str, Any]) -> str:
    if choices := _choices(schema):
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems")
        inner = ", then ".join(map(_words, items)) if items else _words(schema.get("items", {}))
        least = f", at least {schema['minItems']}" if schema.get("minItems") and not items else ""
        return f"a list (each item {inner}{least})"
    words = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "null": "none",
        "string": "a text",
    }.get(str(kind), "a mapping in the YAML file")
    if schema.get("format") in ("path", "file-path", "directory-path"):
        words = "a path"
    limits = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
        "multipleOf": "a multiple of",
    }
    bounds = [f"{sign} {schema[limit]}" for limit, sign in limits.items() if limit in schema]
    if schema.get("minLength"):
        bounds.append("that is not empty")
    if "pattern" in schema:
        bounds.append(f"of the form {schema['pattern']}")
    return " ".join([words, " and ".join(bounds)]).strip()
