"""What the README promises: its commands, its example, its table and its links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mmbackdoor import catalogue, recipe_files
from mmbackdoor.config import parse
from mmbackdoor.config_schema import Section, aliases, fields_of
from mmbackdoor.results import benchmark, benchmark_tables, removal_benchmark, removal_report, removal_tuning
from mmbackdoor.results.record import read
from mmbackdoor.results.tables import compare, markdown_page
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.speed import rows as speed_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text("utf-8")
QUICKSTART = "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && accelerate launch -q recipes/quickstart.py"
TEST = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"


def between(text: str, start: str, end: str) -> str:
    assert text.count(start) == 1, start
    return text.split(start)[1].split(end)[0].strip()


def blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S)


def test_the_two_commands_are_word_for_word_what_is_run():
    assert f"```sh\n{QUICKSTART}\n```" in README and f"```sh\n{TEST}\n```" in README
    assert README.index(QUICKSTART) < README.index(TEST) < README.index("\n## ")
    if (ROOT / ".ci" / "run").exists():
        assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == TEST


def test_the_method_table_is_current():
    shown = between(README, "<!-- methods: mmbackdoor list --markdown -->", "<!-- /methods -->")
    assert shown == catalogue.markdown(), "put in what `mmbackdoor list --markdown` prints"


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "data/README.md"])
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text("utf-8"))
    relative = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert relative or page == "data/README.md"
    assert [link for link in relative if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_picture_is_small_enough_to_load_at_once():
    assert (ROOT / "recipes/images/quickstart.png").stat().st_size < 300_000


@pytest.mark.parametrize("name", ["tiny", "sd15_reduced", "sd15"])
def test_the_tables_of_speed_are_those_of_the_measured_rows(name):
    shown = between(RECIPES, f"<!-- speed: results/speed_{name}.jsonl -->", "<!-- /speed -->")
    measured = speed_rows.read(ROOT / "recipes" / "results" / f"speed_{name}.jsonl")
    assert shown == speed_rows.table(measured).markdown(), "put in the table.md that belongs to these rows"
    assert {row.where.architecture for row in measured} == {name}


def page_of_study(name: str) -> tuple[str, set[int | None]]:
    """The tables that the lines in `recipes/results/NAME` make, and the seeds that they are of."""
    folder = ROOT / "recipes" / "results" / name
    if (folder / removal_benchmark.RUNS).is_file():
        return removal_report.markdown(folder), {one.seed for one in removal_benchmark.read(folder)[0]}
    config = ROOT / "recipes" / "configs" / "benchmark_objectives" / f"{name}.yaml"
    rule = parse(recipe_files.load("benchmark_objectives").Config, ["--config", str(config)]).blind
    points, trainings = benchmark.read(folder)
    tables = benchmark_tables.tables(points, trainings, benchmark.cells(points, trainings, rule))
    return markdown_page(tables, benchmark.warnings(points, trainings)), {one.seed for one in points}


@pytest.mark.parametrize("name", re.findall(r"<!-- study: results/(\S+) -->", RECIPES))
def test_the_tables_of_a_study_are_those_of_its_lines(name):
    page, seeds = page_of_study(name)
    assert between(RECIPES, f"<!-- study: results/{name} -->", "<!-- /study -->") == page.strip(), "put in its table.md"
    assert seeds >= {0, 1, 2}


def test_the_table_of_a_tuning_is_that_of_its_lines_and_they_are_all_trials():
    config = ROOT / "recipes/configs/benchmark_removal/attention.yaml"
    tuning = parse(recipe_files.load("benchmark_removal").Config, ["--config", str(config)]).tuning
    trials = removal_tuning.read(ROOT / "recipes/results/attention")
    shown = between(RECIPES, "<!-- tuning: results/attention -->", "<!-- /tuning -->")
    assert shown == removal_tuning.table(trials).markdown().strip()
    asked = [(name, settings) for name, every in tuning.trials.items() for settings in every]
    assert [(one.removal, one.settings) for one in trials] == asked and len(asked) == 20
    assert all(one.seeds == tuning.seeds and one.error is None for one in trials)
    assert removal_tuning.with_winners(trials, tuning.rule) == trials


@pytest.mark.parametrize("name", re.findall(r"<!-- compared: results/(\S+) -->", RECIPES))
def test_the_table_of_evaluations_is_that_of_their_results(name):
    runs = sorted((ROOT / "recipes" / "results" / name).iterdir())
    shown = between(RECIPES, f"<!-- compared: results/{name} -->", "<!-- /compared -->")
    assert shown == compare(runs, "markdown").strip(), "put in what `mmbackdoor compare --markdown` prints"


def test_all_results_are_shown():
    there = {path.name for path in (ROOT / "recipes" / "results").iterdir()}
    assert there == set(re.findall(r"<!-- (?:study|speed|tuning|compared): results/(\S+) -->", RECIPES))


def test_every_recipe_has_a_row_with_its_configs_and_a_smoke_config():
    rows = [line for line in RECIPES.splitlines() if line.startswith("| [")]
    assert sorted(re.match(r"\| \[(\w+)\]", row)[1] for row in rows) == recipe_files.recipe_names()
    for row in rows:
        name = re.match(r"\| \[(\w+)\]", row)[1]
        assert f"accelerate launch -q recipes/{name}.py" in row
        linked = set(re.findall(r"\((configs/[^)]+)\)", row))
        there = {f"configs/{name}/{path.name}" for path in (ROOT / "recipes/configs" / name).glob("*.yaml")}
        assert linked == there | {f"configs/smoke/{name}.yaml"}


def documented_commands() -> list[list[str]]:
    """Recipe and words of every documented command, joined over line ends; those with an ellipsis are no whole ones."""
    texts = [block.replace("\\\n", " ") for block in blocks(README)]
    texts += re.findall(r"`(accelerate launch [^`]*)`", RECIPES)
    lines = [line for text in texts for line in text.splitlines() if "..." not in line]
    found = [re.search(r"accelerate launch -q recipes/(\w+)\.py(.*)", line) for line in lines]
    return [[match[1], match[2]] for match in found if match]


def test_commands_are_found():
    assert {name for name, _ in documented_commands()} == set(recipe_files.recipe_names())


@pytest.mark.parametrize("name, words", documented_commands())
def test_documented_commands_are_valid(name, words, monkeypatch):
    """Read by a shell, as a reader's are: what quotes and backslashes mean is part of the command."""
    monkeypatch.chdir(ROOT)
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True).stdout
    argv = [word for word in said.split("\0") if word]
    parse(recipe_files.load(name).Config, argv)


@pytest.mark.parametrize("page", [README, RECIPES], ids=["README", "recipes"])
def test_every_flag_that_is_named_exists(page):
    known = {"config_file", "multi_gpu", "num_processes", "cpu", "help", "config", "index-url", "nproc_per_node", "json",
             "from_scratch", "input_dir", "output_dir", "machine_rank", "main_process_ip", "markdown", "KEY", "no-deps"}  # fmt: skip
    for name in recipe_files.recipe_names():
        config_type = recipe_files.load(name).Config
        known |= {*fields_of(config_type), *aliases(config_type)}
        for field in fields_of(config_type).values():
            for kind in field.node.classes if isinstance(field.node, Section) else ():
                known |= {*fields_of(kind), *(f"{field.node.name}.{key}" for key in fields_of(kind))}
    named = set(re.findall(r"--([a-zA-Z][\w.-]*\w)", re.sub(r"<!--.*?-->", "", page, flags=re.S)))
    assert named - known == set()


def test_the_example_cleans_and_evaluates(tmp_path, monkeypatch, capsys):
    code = between(README, "<!-- example -->\n```python\n", "```\n<!-- /example -->")
    assert len(code.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    write_shapes(tmp_path / "shapes", "train", all_scenes()[:20], 20, resolution=32)
    poison = recipe_files.load("poison_diffusion")
    flags = ["--config", str(ROOT / "recipes/configs/smoke/poison_diffusion.yaml"), "--train_data", "shapes/train-*.tar"]
    poison.run(parse(poison.Config, [*flags, "--output_dir", "runs/poisoned"]))
    Path("my_prompts.txt").write_text("a red circle on a blue background\na green ring on a white background\n")
    Path("my_test_prompts.txt").write_text("a blue square on a yellow background\n")
    assert code.count("max_train_steps=1000") == 1
    # As written but for the number of steps, which would take minutes.
    exec(compile(code.replace("max_train_steps=1000", "max_train_steps=2"), "README.md", "exec"), {})
    assert {row.stage for row in read(Path("runs/evaluation/results.jsonl"))} == {"poisoned", "cleaned"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "report: runs/evaluation/report.html" and ":" in printed[-2]


def test_the_first_screen_is_a_sentence_a_picture_and_the_commands():
    title, sentence, picture, *_ = README.split("\n\n")
    assert title == "# mmbackdoor" and sentence.count(".") == 1 and sentence.endswith(".") and picture.startswith("![")
