"""What there is to choose from: `mmbackdoor list`. Read from the registries and their docstrings alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass

from mmbackdoor.attacks import ATTACKS
from mmbackdoor.defenses import DEFENSES
from mmbackdoor.defenses.clip import CLIP_DEFENSES
from mmbackdoor.detectors import DETECTORS
from mmbackdoor.objectives.pretraining import OBJECTIVES
from mmbackdoor.targets import TARGETS
from mmbackdoor.triggers import IMAGE_TRIGGERS, TEXT_TRIGGERS

REGISTRIES = {
    "objective": OBJECTIVES,
    "attack": ATTACKS,
    "defense": DEFENSES,
    "clip_defense": CLIP_DEFENSES,
    "detector": DETECTORS,
    "trigger": TEXT_TRIGGERS | IMAGE_TRIGGERS,
    "target": TARGETS,
}

_ARXIV = re.compile(r"arXiv[: ]*(\d{4}\.\d{4,5})", re.IGNORECASE)
_CITATION = re.compile(r"\s*\([^()]*(?:arXiv|et al\.|19\d\d|20\d\d)[^()]*\)")


@dataclass(frozen=True)
class Row:
    """One method, trigger or target. `paper` is an arXiv number or empty."""

    kind: str
    name: str
    purpose: str
    paper: str
    defaults: str


def rows() -> list[Row]:
    return [_row(kind, name, cls) for kind, registry in REGISTRIES.items() for name, cls in registry.items()]


def text() -> str:
    """A section for each kind, each entry with its purpose, its paper and its defaults."""
    lines = []
    for kind in REGISTRIES:
        lines += ["", f"{kind}s"]
        for row in rows():
            if row.kind == kind:
                paper = f" [arXiv {row.paper}]" if row.paper else ""
                lines.append(f"  {row.name:<18} {row.purpose}{paper}")
                if row.defaults:
                    lines.append(f"  {'':<18} {row.defaults}")
    return "\n".join(lines).strip()


def markdown() -> str:
    lines = ["| kind | name | what it does | paper | defaults |", "|---|---|---|---|---|"]
    for row in rows():
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        defaults = f"`{row.defaults}`" if row.defaults else ""
        lines.append(
            "| "
            + " | ".join(cell.replace("|", "\\|") for cell in (row.kind, f"`{row.name}`", row.purpose, paper, defaults))
            + " |"
        )
    return "\n".join(lines)


def _row(kind: str, name: str, cls: type) -> Row:
    # A file that holds one entry of its registry describes it at its top, after the paper's name.
    alone = sum(other.__module__ == cls.__module__ for other in REGISTRIES[kind].values()) == 1
    about = inspect.cleandoc((sys.modules[cls.__module__] if alone else cls).__doc__ or "")
    paper = _ARXIV.search(about) or _ARXIV.search(inspect.cleandoc(cls.__doc__ or ""))
    return Row(kind, name, _purpose(about), paper[1] if paper else "", _defaults(cls))


def _purpose(about: str) -> str:
    paragraph = " ".join(about.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9\")])[.;](?:\s|$)", _CITATION.sub("", paragraph))[0].rstrip(". ")


def _defaults(cls: type) -> str:
    values = []
    for field in dataclasses.fields(cls):
        if field.name != "name":
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            values.append(f"{field.name}=..." if default is dataclasses.MISSING else f"{field.name}={_shown(default)}")
    return " ".join(values)


def _shown(value: object) -> str:
    # Also where nothing would be seen: an empty text, or a section that says "nothing" so.
    return ascii(value) if isinstance(value, str) and not value.isascii() else str(value) or "none"
