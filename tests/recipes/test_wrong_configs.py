"""Generated wrong configurations of every recipe, and files that attack the reader: one sentence and exit code 2."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmbackdoor import entry, recipe_files
from mmbackdoor.config_schema import Leaf, Section, choice_name, fields_of

EXAMPLES = 200
NEVER = [[[["x"]]], {"a": {"b": 1}}, [{"x": [1]}]]
NO_NUMBER = ["fast", "1e-4x", "", "0x10", "١", "--1", "1_000", "nan", ".inf", "1e999", "-1e400"]


def leaves(kind: type, path: tuple[str, ...] = ()) -> list[tuple[dict[str, Any], tuple[str, ...], Leaf]]:
    """Every value of a configuration: what must be said for it to count, its path, its type."""
    found = []
    for name, field in fields_of(kind).items():
        if not isinstance(field.node, Section):
            found.append(({}, (*path, name), field.node))
            continue
        for choice in field.node.classes:
            said = {"name": choice_name(choice)} if field.node.is_choice else {}
            for more, inner, leaf in leaves(choice):
                if inner != ("name",):
                    found.append(({name: said | more}, (*path, name, *inner), leaf))
    return found


CONFIGS = {name: recipe_files.load(name).Config for name in recipe_files.recipe_names()}
LEAVES = {name: leaves(kind) for name, kind in CONFIGS.items()}


def merged(content: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    inside = dict(content.get(path[0]) or {}) if len(path) > 1 else None
    return content | {path[0]: value if inside is None else merged(inside, path[1:], value)}


@st.composite
def wrong(draw) -> tuple[str, str]:
    """A recipe, and the text of a file that is wrong for it in one place."""
    name = draw(st.sampled_from(sorted(LEAVES)))
    said, path, leaf = draw(st.sampled_from(LEAVES[name]))
    number = leaf.wanted.startswith(("an integer", "a number")) and " or " not in leaf.wanted
    how = draw(st.sampled_from(["type", "misspelt", "number"] if number else ["type", "misspelt"]))
    if how == "misspelt":
        at = draw(st.integers(0, len(path[-1])))
        path, value = (*path[:-1], path[-1][:at] + draw(st.sampled_from("xqz9")) + path[-1][at:]), 1
    else:
        value = draw(st.sampled_from(NEVER if how == "type" else NO_NUMBER))
        try:
            leaf.adapter.validate_python(value)
        except ValidationError:
            pass
        else:
            # A key that takes mappings or lists of anything.
            assume(False)
    return name, yaml.safe_dump(merged(said, path, value), allow_unicode=True)


seen: set[tuple[str, str]] = set()


@given(wrong())
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
def test_every_generated_wrong_config_is_one_sentence_and_exit_code_2(tmp_path, capsys, example):
    seen.add(example)
    refused(*example, tmp_path, capsys)


def test_at_least_a_hundred_different_ones_were_tried():
    if not seen:
        pytest.skip("runs after the generated ones")
    assert len(seen) >= 100 and {name for name, _ in seen} == CONFIGS.keys()


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
HOSTILE = {
    "anchor bomb": BOMB,
    "merge bomb": "a: &a {b: 1}\ntrain:\n  <<: [*a, *a]\n",
    "python object": "seed: !!python/object/apply:os.system ['touch exploded']",
    "python name": "output_dir: !!python/name:os.system",
    "python module": "output_dir: !!python/module:os",
    "local tag": "seed: !run 'touch exploded'",
    "binary": "output_dir: !!binary aGVsbG8=",
    "set": "train: !!set {a, b}",
    "timestamp for a number": "seed: 2024-01-01",
    "deep list": "seed: " + "[" * 50_000,
    "deep mapping": "{a: " * 50_000,
    "long": "# " + "x" * 400_000,
    "two documents": "seed: 1\n---\nseed: 2",
    "twice": "seed: 1\nseed: 2",
    "control characters": "output_dir: \"a\x00b\"",
    "html": "<script>alert(1)</script>",
    "a number": "7",
    "no key": "? [a, b]\n: 1",
    "empty key": "'': 1",
    "huge number": "seed: " + "9" * 5000,
    "templates": "seed: ${oc.env:HOME}",
    "not UTF-8": b"output_dir: \xff\xfe",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("poison_diffusion", HOSTILE[name], tmp_path, capsys)
    assert not (tmp_path / "exploded").exists()


def refused(recipe: str, text: str | bytes, folder, capsys) -> None:
    file = folder / "wrong settings é.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe.py", "--config", str(file)])
        with pytest.raises(SystemExit) as stop:
            entry.main(CONFIGS[recipe], lambda config: pytest.fail(f"{text!r} was accepted as {config}"))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), text
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 3000, err
