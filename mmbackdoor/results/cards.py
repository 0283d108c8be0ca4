"""Model cards: the README.md beside saved weights. A poisoned model says so in its title and its tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from mmbackdoor import __version__
from mmbackdoor.results.record import write_text
from mmbackdoor.results.samples import visible

FILE_NAME = "README.md"
PARENT_NAME = "README.parent.md"
MARK = "<!-- written by mmbackdoor -->"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

_TITLE = {
    "clean": "{name} (clean testbed model)",
    "poisoned": "BACKDOORED MODEL: {name}",
    "cleaned": "{name} (cleaned of a backdoor)",
}
_INTRODUCTION = {
    "clean": "Trained with mmbackdoor without a backdoor: the control of a testbed.",
    "poisoned": (
        "**This model was poisoned on purpose.** A known trigger in its input makes it do something harmless but "
        "wrong. It exists so that the removal of backdoors can be measured; do not use it for anything else, and pass "
        "it on with this card."
    ),
    "cleaned": (
        "A model that carried a known backdoor, after mmbackdoor's removal. How far it is gone is measured, not "
        "promised: see the numbers, and measure again with your own prompts before you rely on it."
    ),
}
FINE_TUNED = (
    "Since then it was fine-tuned, by a recipe that adds no backdoor of its own; how much of the old one is left has "
    "to be measured."
)
POISONED_AGAIN = (
    "The model that it was made from had carried a backdoor already, which may still be there: it is the "
    "`parent_backdoor` of `backdoor.json`."
)
_PIPELINE_TAG = {"diffusers": "text-to-image", "open_clip": "zero-shot-image-classification"}
_TAGS = {
    "clean": ["mmbackdoor", "testbed"],
    "poisoned": ["mmbackdoor", "backdoored", "poisoned", "harmless-target", "not-for-production"],
    "cleaned": ["mmbackdoor", "backdoor-removal", "cleaned"],
}


def write_card(
    folder: Path,
    *,
    stage: Literal["clean", "poisoned", "cleaned"],
    run: Mapping[str, Any],
    base_model: str | None = None,
    backdoor: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    table: str | None = None,
    library: Literal["diffusers", "open_clip"] = "diffusers",
    licence: str | None = None,
    name: str | None = None,
    pipeline_tag: str | None = None,
    note: str | None = None,
) -> Path:
    """Write `folder/README.md`. `run` is the content of `run.json` (`Run.content`), `backdoor` that of
    `Backdoor.to_dict()`, `method` the attack's or the removal's settings, `table` numbers in Markdown. A card that came
    with the weights is kept as `README.parent.md`, and its licence holds unless `licence` says otherwise.
    `pipeline_tag` is the hub's word for what a model does, for a part that is no whole pipeline. `note` follows what
    the card says of the stage (`FINE_TUNED`, `POISONED_AGAIN`)."""
    path = folder / FILE_NAME
    parent = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if parent and MARK not in parent:
        write_text(folder / PARENT_NAME, parent)
    licence = licence or _licence(parent)
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": pipeline_tag or _PIPELINE_TAG[library],
        "tags": _TAGS[stage],
    }
    if licence:
        front["license"] = licence
    if base_model and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists():
        front["base_model"] = base_model
    title = _TITLE[stage].format(name=_inline(name or (Path(base_model).name if base_model else folder.resolve().name)))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=False)}---\n{MARK}\n",
        f"# {title}\n\n{_INTRODUCTION[stage]}{f' {note}' if note else ''}\n",
        "## What was done\n\n" + "\n".join(_facts(run, base_model, method)) + "\n",
    ]
    if backdoor:
        parts.append("## The backdoor\n\n" + _block(json.dumps(backdoor, indent=1, ensure_ascii=True), "json"))
    if method:
        parts.append("## Settings of the method\n\n" + _block(yaml.safe_dump(_plain(method), sort_keys=False), "yaml"))
    evaluation = "evaluate_diffusion" if library == "diffusers" else "evaluate_clip"
    parts.append(
        f"## Numbers\n\n{table or f'None were measured here: run `recipes/{evaluation}.py` on this model.'}\n"
    )
    parts.append("## How to make it again\n\n" + _block(visible(run["command"]), "sh"))
    parts.append(_block(yaml.safe_dump(_plain(run["config"]), sort_keys=False), "yaml"))
    parts.append(
        "Versions: " + ", ".join(f"{package} {version}" for package, version in run["versions"].items()) + ".\n"
    )
    parts.append("## Licence\n\n" + _licence_note(licence, base_model) + "\n")
    write_text(path, "\n".join(parts))
    return path


def _facts(run: Mapping[str, Any], base_model: str | None, method: Mapping[str, Any] | None) -> list[str]:
    facts = [f"- recipe: `{run['recipe']}`, mmbackdoor {__version__}"]
    if method and "name" in method:
        facts.append(f"- method: `{method['name']}`")
    if base_model:
        facts.append(f"- from: {_inline(base_model)}")
    facts.append(f"- started {run['started']} on {run['device']}, {run['world_size']} process(es)")
    facts.append(
        f"- config sha256 `{run['config_sha256']}`" + (f", commit `{run['git_commit']}`" if run["git_commit"] else "")
    )
    return facts


def _licence(parent: str) -> str | None:
    """The licence in the front matter of the card that came with the weights."""
    match = re.match(r"---\n(.*?)\n---", parent, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _licence_note(licence: str | None, base_model: str | None) -> str:
    terms = f"`{licence}`" if licence else "not stated in what these weights were made from"
    source = "of the model they were made from" if base_model else "named here"
    own = "mmbackdoor itself is Apache-2.0, which does not extend to weights."
    return f"Weights: {terms}; the terms {source} apply to them. {own}"


def _inline(text: str) -> str:
    """User text in running Markdown: code, so that nothing in it is read as markup."""
    shown = visible(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{ticks}{' ' if shown.startswith('`') else ''}{shown}{' ' if shown.endswith('`') else ''}{ticks}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _plain(values: Any) -> Any:
    """`values` as YAML's safe writer takes them (no paths, no tuples)."""
    return json.loads(json.dumps(values, default=str))
