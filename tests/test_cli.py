"""The command `mmbackdoor`: what it prints, its exit codes, and that its front door is light."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mmbackdoor import catalogue, cli, recipe_files
from mmbackdoor.config_schema import aliases, fields_of, undotted

RECIPE = '''"""A recipe."""
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path

@dataclass(frozen=True)
class Train:
    steps: int = 3

@dataclass(frozen=True)
class Config:
    output_dir: Path
    train: Train = field(default_factory=Train)
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small checkout in place of the real one."""
    files = {
        "recipes/grow.py": RECIPE,
        "recipes/shrink.py": RECIPE,
        "recipes/bare.py": '"""Nothing to set."""\n',
        "recipes/configs/grow/case.yaml": "output_dir: out\ntrain: {steps: 5}\n",
        "recipes/configs/grow/short.yaml": "steps: 5\n",
        "recipes/configs/grow/wrong.yaml": "output_dir: out\ntrain: {stepz: 5}\n",
        "recipes/configs/smoke/shrink.yaml": "output_dir: out\n",
        "data/build.py": '"""Builds."""\n',
        "data/prompts/words.txt": "a\n",
        "data/cache/shard-000000.tar": "not copied",
        "recipes/__pycache__/grow.json": "not copied",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(recipe_files, "folders", lambda: {"recipes": tmp_path / "recipes", "data": tmp_path / "data"})
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        cli.main([str(word) for word in argv])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_what_a_stage_leaves_in_a_circle_is_freed_before_the_next(monkeypatch):
    left = []

    class Model:
        pass

    def run(cfg):
        model = Model()
        model.itself = model
        left.append(weakref.ref(model))

    real = recipe_files.load("clean_diffusion")
    monkeypatch.setattr(recipe_files, "load", lambda name: SimpleNamespace(Config=real.Config, run=run))
    gc.disable()
    try:
        recipe_files.stage("clean_diffusion")
    finally:
        gc.enable()
    assert left[0]() is None


def test_help_is_light():
    code = (
        "import sys, mmbackdoor.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stop: print(stop.code, sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[1]
    )
    assert done.stdout.endswith("\n0 []\n")
    assert {"list", "validate", "recipes", "shards", "compare", "report"} <= set(
        re.findall(r"^    (\w+)", done.stdout, re.MULTILINE)
    )


def test_version(capsys):
    assert run(capsys, "--version") == (0, "0.1.0\n", "")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["lst"],
        ["list", "--markdwn"],
        ["validate"],
        ["shards"],
        ["shards", "split", "a", "b"],
        ["report"],
        ["list", "x"],
    ],
)
def test_wrong_arguments_are_one_sentence(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


def test_list_names_every_method(capsys):
    code, out, _ = run(capsys, "list")
    table = run(capsys, "list", "--markdown")[1]
    names = [name for registry in catalogue.REGISTRIES.values() for name in registry]
    assert {"badt2i_pixel", "skd_cag", "zero_width", "badnet_noise", "object", "class"} <= set(names)
    assert code == 0 and len(table.splitlines()) == len(names) + 2
    for name in names:
        assert re.search(rf"^  {name} +\S", out, re.MULTILINE), name
        assert re.search(rf"^\| \w+ \| `{name}` \| [^|]+ \|", table, re.MULTILINE), f"{name} does not say what it does"
    assert "https://arxiv.org/abs/2508.18235" in table
    assert len(set(map(len, (re.findall(r"(?<!\\)\|", line) for line in table.splitlines())))) == 1


def test_list_shows_the_defaults(capsys):
    from mmbackdoor.defenses import DEFENSES

    out = run(capsys, "list")[1]
    for field in dataclasses.fields(DEFENSES["skd_cag"]):
        assert field.name == "name" or f" {field.name}=" in out


def test_validate_finds_the_recipe(capsys, house):
    configs = house / "recipes/configs"
    assert run(capsys, "validate", configs / "grow/case.yaml")[1].endswith("is a valid configuration of grow\n")
    assert run(capsys, "validate", configs / "smoke/shrink.yaml")[1].endswith("of shrink\n")
    assert run(capsys, "validate", configs / "smoke/shrink.yaml", "--recipe", "grow")[1].endswith("of grow\n")
    assert run(capsys, "validate", configs / "grow/short.yaml", "--output_dir", "out")[0] == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["grow/wrong.yaml"], "train.stepz: 5 (in "),
        (["grow/short.yaml"], "output_dir is missing"),
        (["grow/case.yaml", "--train.steps", "x"], "--train.steps 'x' is not possible: give an integer"),
        (["grow/none.yaml"], "cannot be read"),
        (["elsewhere/case.yaml"], "does not say which recipe it is for"),
        (["grow/case.yaml", "--recipe", "gorw"], "did you mean 'grow'"),
        (["grow/case.yaml", "--recipe", "bare"], "nothing to check"),
    ],
)
def test_validate_says_what_is_wrong(capsys, house, argv, words):
    code, out, err = run(capsys, "validate", str(house / "recipes/configs" / argv[0]), *argv[1:])
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1


CONFIGS = sorted(
    path for path in recipe_files.folders()["recipes"].glob("configs/*/*.yaml") if path.parent.name != "accelerate"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_is_valid(capsys, path):
    code, out, err = run(capsys, "validate", str(path))
    assert (code, err) == (0, "") and out.startswith("OK")


@pytest.mark.parametrize("name", recipe_files.recipe_names())
def test_a_key_without_its_section_means_one_thing(name):
    config_type = vars(recipe_files.load(name)).get("Config")
    if config_type is not None:
        sections = [set(fields_of(section.classes[0])) for section in undotted(config_type)]
        counts = Counter(key for keys in sections for key in keys)
        twice = {key for key, count in counts.items() if count > 1} | (
            set(counts) & set(fields_of(config_type)) - {"model", "backdoor"}
        )
        assert not twice, f"{name}: {twice} are in several sections, or in one and at the top"
        for alias, path in aliases(config_type).items():
            assert alias.replace("-", "_") not in {*counts, *fields_of(config_type)}, f"{name}: {alias}"
            section, _, key = path.rpartition(".")
            known = fields_of(fields_of(config_type)[section].node.classes[0] if section else config_type)
            assert key in known, f"{name}: {path}"


def test_recipes_are_copied_out_once(capsys, house, tmp_path):
    target = tmp_path / "new/place"
    code, out, _ = run(capsys, "recipes", target)
    assert code == 0 and "9 files copied" in out
    assert (target / "recipes/configs/grow/case.yaml").read_text().startswith("output_dir")
    assert sorted(
        path.name for path in target.rglob("*") if path.is_file() and path.parts[-2] in ("data", "cache", "prompts")
    ) == ["build.py", "words.txt"]
    (target / "recipes/grow.py").write_text("mine")
    (target / "data/build.py").unlink()
    code, out, err = run(capsys, "recipes", target)
    assert code == 2 and "8 files are there already" in err and "--force" in err
    assert not (target / "data/build.py").exists(), "nothing is written where something stands in the way"
    assert run(capsys, "recipes", target, "--force")[0] == 0
    assert (target / "recipes/grow.py").read_text() == RECIPE
    (tmp_path / "file").write_text("")
    assert run(capsys, "recipes", tmp_path / "file")[0] == 2


@pytest.fixture
def shards(tmp_path):
    """A shard of four good samples."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    with tarfile.open(tmp_path / "set-000000.tar", "w") as tar:
        for key in range(4):
            for name, data in ((f"{key}.png", picture.getvalue()), (f"{key}.txt", b"a square")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return tmp_path / "set-000000.tar"


def test_shards_are_counted_checked_and_split(capsys, shards, tmp_path):
    code, out, _ = run(capsys, "shards", "info", shards)
    assert code == 0 and "1 shards, 4 samples" in out
    assert run(capsys, "shards", "check", shards)[:2] == (0, "1 shards, 4 good samples, no problems\n")
    assert run(capsys, "shards", "split", shards, tmp_path / "two", "--count", "2")[0] == 0
    assert "2 shards, 4 good samples" in run(capsys, "shards", "check", tmp_path / "two", "--workers", "2")[1]
    assert run(capsys, "shards", "split", shards, tmp_path / "five", "--count", "5")[0] == 2
    shards.write_bytes(shards.read_bytes()[:3000])
    code, out, err = run(capsys, "shards", "check", shards)
    assert code == 2 and str(shards) in out and "has the problems listed above" in err


def test_compare_and_report_hand_on_what_was_asked(capsys, monkeypatch, tmp_path):
    from mmbackdoor.results import report, tables

    monkeypatch.setattr(tables, "compare", lambda runs, form: f"{form} of {[path.name for path in runs]}")
    monkeypatch.setattr(report, "build", lambda path: path / "report.html")
    monkeypatch.setattr(report, "summary", lambda path: {"verdict": "removed"})
    assert run(capsys, "compare", "a", "b")[1] == "text of ['a', 'b']\n"
    assert run(capsys, "compare", "a", "--markdown")[1] == "markdown of ['a']\n"
    assert run(capsys, "report", tmp_path)[1] == f"{tmp_path}/report.html\n"
    assert json.loads(run(capsys, "report", tmp_path, "--json")[1]) == {"verdict": "removed"}


@pytest.mark.parametrize("argv", [["compare", "nowhere"], ["report", "nowhere"], ["report", "nowhere", "--json"]])
def test_a_run_that_is_not_there_is_one_sentence(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert "nowhere" in err and err.count("\n") == 1


SHORT = "from mmbackdoor.entry import guarded; guarded(lambda: print('short'))"


@pytest.mark.parametrize("command", [["-m", "mmbackdoor.cli", "list"], ["-c", SHORT]], ids=["long", "short"])
def test_output_into_a_closed_pipe_is_no_traceback(command):
    """More than Python's buffer holds, and less, which is written when the command has ended."""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, *command], stdout=write, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
