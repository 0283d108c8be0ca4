"""Settings from YAML and flags: what they read, and what they say about everything else."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from mmbackdoor import entry
from mmbackdoor.config import Doc, Escaped, changed, config_sha256, parse, to_yaml
from mmbackdoor.triggers import TextTrigger
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Plain:
    """The plain one."""

    weight: Annotated[float, Field(ge=0), Doc("of the loss")] = 1.0
    name: Literal["plain"] = "plain"


@dataclass(frozen=True)
class Guided:
    weight: Annotated[float, Field(ge=0)] = 2.0
    attention_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    match: Literal["words", "all"] = "words"
    name: Literal["guided"] = "guided"

    def __post_init__(self) -> None:
        if self.weight == 13:
            raise InputError("weight 13 is not possible; give another")


@dataclass(frozen=True)
class Network:
    model: str = "tiny"
    pretrained: str | None = None


@dataclass(frozen=True)
class Training:
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    max_train_steps: Annotated[int, Field(ge=1)] = 10
    use_ema: bool = False
    checkpointing_steps: int | Literal["epoch"] = 5
    lr_scheduler: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class Config:
    output_dir: Path
    model: Network = Network()
    train: Training = Training(max_train_steps=20)
    defense: Annotated[Plain | Guided, Field(discriminator="name")] = Guided(attention_weight=0.7)
    second: Annotated[Plain | Guided, Field(discriminator="name")] | None = None
    trigger: Annotated[tuple[str, ...], Escaped] = ()
    sizes: tuple[int, ...] = (1, 2)
    note: str | None = None
    seed: int = 0
    ALIASES: ClassVar[dict[str, str]] = {"lr": "train.learning_rate", "batch-size": "train.max_train_steps"}


@dataclass(frozen=True)
class Triggers:
    triggers: Annotated[tuple[Annotated[TextTrigger, Field(discriminator="name")], ...], Doc("marks")] = ()


def read(*flags: str) -> Config:
    return parse(Config, ["--output_dir", "out", *flags])


def read_yaml(tmp_path: Path, text: str, *flags: str) -> Config:
    file = tmp_path / "case.yaml"
    file.write_text(text)
    return parse(Config, ["--output_dir", "out", "--config", str(file), *flags])


def complaint(*flags: str) -> str:
    with pytest.raises(InputError) as caught:
        read(*flags)
    return str(caught.value)


def test_defaults_are_the_dataclass_s():
    assert read() == Config(Path("out"))


def test_dotted_undotted_alias_dash_and_equals_name_the_same_key():
    expected = dataclasses.replace(Config(Path("out")), train=Training(learning_rate=0.5, max_train_steps=20))
    for flags in (
        ["--train.learning_rate", "0.5"],
        ["--learning_rate", "0.5"],
        ["--learning-rate=0.5"],
        ["--lr", "5e-1"],
        ["--learning_rate", "3", "--lr", "0.5"],
    ):
        assert read(*flags) == expected, flags
    assert read("--batch-size", "7").train.max_train_steps == 7


def test_a_section_with_a_key_of_its_own_name_takes_a_text():
    assert read("--model", "ViT-B-32", "--pretrained", "x").model == Network("ViT-B-32", "x")
    assert read("--pretrained", "x", "--pretrained", "none").model.pretrained is None


def test_switches():
    assert read("--use_ema").train.use_ema
    assert read("--use-ema", "true").train.use_ema
    assert not read("--use_ema", "--no_use_ema").train.use_ema
    assert not read("--use_ema", "false").train.use_ema
    assert not read("--no-train.use_ema").train.use_ema


def test_lists_by_repetition_or_several_values():
    assert read("--sizes", "3", "4", "--sizes", "5").sizes == (3, 4, 5)
    assert read("--sizes", "-3").sizes == (-3,)


def test_escapes_are_read_where_the_key_asks_for_it(tmp_path):
    assert read("--trigger", r"\u200b", r"a\\u200b\d").trigger == ("\u200b", r"a\u200b\d")
    assert read("--note", r"\u200b").note == r"\u200b"
    assert read_yaml(tmp_path, "trigger: ['\\u200b', \"\\u200b\"]").trigger == ("\u200b", "\u200b")
    assert "no character" in complaint("--trigger", r"\ud800")


def test_a_choice_by_name_takes_that_class_s_defaults():
    assert read("--defense", "plain").defense == Plain()
    assert read("--defense", "guided").defense == Guided(attention_weight=0.7)
    assert read("--second", "guided").second == Guided()
    assert read("--defense", "plain", "--defense.weight", "3").defense == Plain(3)
    assert read("--defense.weight", "3").defense == Guided(3, 0.7)
    assert read("--second", "plain", "--second", "none").second is None


def test_a_name_on_top_of_a_file_keeps_what_the_class_has(tmp_path):
    text = "defense: {name: guided, weight: 3, attention_weight: 0.1}"
    assert read_yaml(tmp_path, text).defense == Guided(3, 0.1)
    assert read_yaml(tmp_path, text, "--defense", "plain").defense == Plain(3)
    with pytest.raises(InputError, match="attention_weight belongs to defense guided"):
        read_yaml(tmp_path, text, "--defense", "plain", "--defense.attention_weight", "1")
    with pytest.raises(InputError, match="belongs to defense guided"):
        read_yaml(tmp_path, "defense: {name: plain, attention_weight: 0.1}")
    with pytest.raises(InputError, match="unknown key 'atention_weight'"):
        read_yaml(tmp_path, "defense: {name: guided, atention_weight: 0.1}", "--defense", "plain")


def test_flags_on_top_of_settings_are_flags_on_top_of_their_file(tmp_path):
    base = read("--defense.weight", "3", "--trigger", r"\u200b", "--seed", "4")
    for flags in ([], ["--defense", "plain"], ["--lr", "2", "--second", "plain"], ["--trigger", "x"]):
        assert changed(base, flags) == read_yaml(tmp_path, to_yaml(base), *flags), flags
    assert changed(base, ["--defense", "plain"]).defense == Plain(3) and base.defense == Guided(3, 0.7)
    with pytest.raises(InputError, match="unknown key 'wrong'"):
        changed(base, ["--defense.wrong", "1"])


def test_yaml_takes_what_flags_take(tmp_path):
    text = "learning-rate: 1e-3\ntrain: {use_ema: true}\ntrain.lr_scheduler: cosine\n"
    text += "model: ViT\ndefense: plain\nnote: 2024-01-01\n"
    config = read_yaml(tmp_path, text, "--seed", "4", "--learning_rate", "2")
    assert config.train == Training(2.0, 20, True, 5, "cosine")
    assert (config.model.model, config.defense, config.note, config.seed) == ("ViT", Plain(), "2024-01-01", 4)


def test_an_integer_with_a_leading_zero_is_decimal(tmp_path):
    assert read_yaml(tmp_path, "seed: 010").seed == 10


def test_values_in_yaml_are_checked_strictly(tmp_path):
    for text in (
        "seed: '3'",
        "seed: 3.0",
        "seed: true",
        "train: {use_ema: 1}",
        "train: {use_ema: yes}",
        "trigger: a",
        "note: 3",
    ):
        with pytest.raises(InputError, match="is not possible"):
            read_yaml(tmp_path, text)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("seed: 1\nseed: 2", "given twice"),
        ("learning_rate: 1\ntrain: {learning_rate: 2}", "says again"),
        ("seed: &a 1\nnote: *a", "anchors"),
        ("note: !!python/object/apply:os.system ['true']", "tags"),
        ("note: !x y", "tags"),
        ("a: " + "[" * 100_000, "deeper"),
        ("[1, 2]", "not `key: value`"),
        ("seed: 1\n---\nseed: 2", "line 2"),
        ("seed: [1", "line"),
        ("note: \x01", "not YAML"),
        ("? [a]\n: 1", "a key must be a text"),
        ("x" * 300_000, "larger"),
    ],
)
def test_yaml_beyond_plain_data_is_refused(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_yaml(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff")
    for file in (tmp_path, tmp_path / "missing.yaml", tmp_path / "bytes.yaml"):
        assert str(file) in complaint("--config", str(file))
    assert "once" in complaint("--config", "a", "--config", "b")
    assert "once" in complaint("--config")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sed", "1"], ["--sed '1'", "did you mean 'seed'", "output_dir"]),
        (["--seed", "x"], ["--seed 'x'", "an integer"]),
        (["--max-train-steps", "0"], ["--max-train-steps '0'", "an integer >= 1"]),
        (["--defense.attention_weight", "2"], ["a number > 0 and <= 1"]),
        (["--defense", "guidde"], ["unknown defense 'guidde'", "did you mean 'guided'", "plain, guided"]),
        (["--defense.match", "word"], ["one of words, all", "did you mean 'words'"]),
        (["--defense.nothing", "1"], ["unknown key 'nothing'", "attention_weight"]),
        (["--train", "1"], ["train is a section", "learning_rate"]),
        (["--seed.x", "1"], ["seed is a value"]),
        (["--seed"], ["has no value", "an integer"]),
        (["--seed", "1", "2"], ["takes one value"]),
        (["--no_seed"], ["--no_seed", "true or false"]),
        (["--lr", "1e999"], ["finite"]),
        (["--checkpointing_steps", "epok"], ["an integer or epoch"]),
        (["--defense.weight", "13"], ["weight 13 is not possible"]),
        (["--sizes", "1", "a"], ["a list (each item an integer)"]),
        (["--defense", "none"], ["unknown defense 'none'"]),
        (["--second.weight", "1"], ["second is missing", "plain, guided"]),
    ],
)
def test_a_complaint_names_key_value_and_what_to_do(flags, words):
    sentence = complaint(*flags)
    for word in words:
        assert word in sentence
    assert "\n" not in sentence


def test_a_missing_value_is_named():
    with pytest.raises(InputError, match="output_dir is missing .* give --output_dir with a path"):
        parse(Config, [])
    with pytest.raises(InputError, match="'stray' stands before any flag"):
        parse(Config, ["stray"])


def test_a_list_of_dataclasses_is_read_from_yaml_with_its_own_sentence(tmp_path):
    file = tmp_path / "triggers.yaml"
    file.write_text("triggers: [{name: word, text: cf}]")
    config = parse(Triggers, ["--config", str(file)])
    assert config.triggers[0].text == "cf"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse(Triggers, ["--config", str(tmp_path / "again.yaml")]) == config
    file.write_text("triggers: [{name: word, text: c f}]")
    with pytest.raises(InputError, match="is one word, not 'c f'"):
        parse(Triggers, ["--config", str(file)])


def test_help_shows_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--seed", "x", "--help"], doc="What it does.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "What it does.",
        "--output_dir  a path (required)",
        "--learning_rate",
        "--defense.weight",
        "of the loss",
        "--lr for",
        "(default 0.7)",
    ):
        assert words in text


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
configs = st.builds(
    Config,
    output_dir=texts.filter(lambda text: "\0" not in text).map(Path),
    model=st.builds(Network, texts, st.none() | texts),
    train=st.builds(
        Training,
        st.floats(1e-9, 1e9),
        st.integers(1, 10**12),
        st.booleans(),
        st.just("epoch") | st.integers(-5, 5),
        st.just("cosine"),
    ),
    defense=st.builds(Plain, st.floats(0, 5)) | st.builds(Guided, st.floats(0, 5), st.floats(0.1, 1), st.just("all")),
    second=st.none() | st.builds(Plain, st.floats(0, 5)),
    trigger=st.lists(texts | st.sampled_from(["no", "1e-4", "012", "~", "2024-01-01", r"\u200b", "\\", "=", "<<"])).map(
        tuple
    ),
    note=st.none() | texts,
    seed=st.integers(-(10**17), 10**17),
)


@given(configs)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_to_yaml_round_trips(tmp_path, config):
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(config))
    again = parse(Config, ["--config", str(file)])
    assert again == config
    assert config_sha256(again) == config_sha256(config)
    assert file.read_bytes().isascii()


def test_config_sha256_tells_configurations_apart():
    assert config_sha256(read()) == config_sha256(read("--seed", "0")) != config_sha256(read("--seed", "1"))


# What no key takes, and values that some key refuses; each example must be wrong in at least one place.
WRONG = {
    "output_dir": [3, None, ["x"], {"a": 1}, True],
    "model": [4, ["x"], {"modell": "x"}, {"model": 3}, {"model": None}],
    "pretrained": [1, [], {}, False],
    "train": [
        "fast",
        3,
        [],
        {"lr": 1},
        {"learning_rate": 0},
        {"learning_rate": "1e-4x"},
        {"max_train_steps": 2.5},
        {"train": {}},
    ],
    "use_ema": [0, "true ", "no", []],
    "lr_scheduler": ["Cosine", "", None, 3],
    "checkpointing_steps": ["epochs", 1.5, None],
    "defense": [
        "guide",
        1,
        None,
        [],
        {"name": "plain", "match": "all"},
        {"name": ["plain"]},
        {"weight": -1},
        {"name": {"name": "plain"}},
    ],
    "defense.match": ["none", {}, 1],
    "second": [0, {"attention_weight": 1}, {"name": "third"}],
    "trigger": ["text", [1], [["a"]], {"a": 1}, None],
    "sizes": [["1"], [1.5], [None], 3],
    "seed": ["1x", 1.5, [1], None, 10**18, float("inf"), "\u200b"],
    "nonsense": [1, "x", {}, []],
    "train.nonsense": [1, {}],
    "": [1],
    ".": [1],
    "defense.": ["x"],
}
wrong_pairs = st.sampled_from([(key, value) for key, values in WRONG.items() for value in values])
misspelt = st.sampled_from(["output_dir", "learning_rate", "trigger", "defense", "seed", "model"]).flatmap(
    lambda key: st.builds(
        lambda at, letter: (key[:at] + letter + key[at:], 1), st.integers(0, len(key)), st.sampled_from("xqz9")
    )
)


@given(
    wrong=wrong_pairs | misspelt,
    right=st.dictionaries(st.sampled_from(["note"]), st.sampled_from(["fine", None])),
    seed=st.integers(0, 10**6),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_wrong_file_is_one_sentence_and_exit_code_2(tmp_path, capsys, wrong, right, seed):
    import yaml

    key, value = wrong
    content = {"output_dir": "out", "seed": seed, **right}
    content[key] = value
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(content))
    expect_one_sentence(capsys, ["--config", str(file)])


@given(
    key=st.sampled_from(
        [
            "seed",
            "lr",
            "max_train_steps",
            "sizes",
            "defense",
            "train",
            "second.weight",
            "nonsense",
            "use_ema",
            "no_such",
        ]
    ),
    values=st.lists(st.text(max_size=8).map(lambda text: "~" + text), min_size=1, max_size=3),
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_wrong_flag_is_one_sentence_and_exit_code_2(capsys, key, values):
    expect_one_sentence(capsys, ["--output_dir", "out", f"--{key}", *values])


def expect_one_sentence(capsys, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe.py", *argv])
        with pytest.raises(SystemExit) as stop:
            entry.main(Config, lambda config: pytest.fail(f"{config} was accepted"))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and len(err) < 1200


RECIPE = """
from __future__ import annotations
import os, signal, sys, time
from dataclasses import dataclass
from mmbackdoor import entry
from mmbackdoor.types import RunFault

@dataclass(frozen=True)
class Config:
    what: str = "nothing"
    seed: int = 0

def run(cfg):
    if cfg.what == "fault":
        raise RunFault("the loss is not finite at step 3")
    if cfg.what == "full":
        raise OSError(28, "No space left on device", "model.safetensors")
    if cfg.what == "bug":
        raise KeyError("oops")
    if cfg.what == "wait":
        print("ready", flush=True)
        time.sleep(30)
    if cfg.what == "loop":
        with entry.graceful():
            print("ready", flush=True)
            while not entry.terminated():
                time.sleep(0.01)
            print("saved", flush=True)
            raise entry.Terminated
    if cfg.what == "deaf":
        with entry.graceful():
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
    if cfg.what == "unseen":
        with entry.graceful():
            os.kill(os.getpid(), signal.SIGTERM)
        print("not reached")

if __name__ == "__main__":
    entry.main(Config, run, "A recipe.")
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE)

    def start(*flags: str, rank: str | None = None) -> subprocess.Popen[str]:
        root = Path(entry.__file__).parents[1]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")} | {
            "PYTHONPATH": str(root)
        }
        if rank is not None:
            environment["RANK"] = rank
        return subprocess.Popen(
            [sys.executable, str(file), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return start


@pytest.mark.parametrize(
    "flags, rank, code, sentence",
    [
        (["--seed", "x"], None, 2, "error: --seed 'x' is not possible: give an integer"),
        (["--seed", "x"], "0", 2, "error: --seed 'x' is not possible: give an integer"),
        (["--seed", "x"], "1", 2, ""),
        (["--what", "fault"], None, 1, "error: the loss is not finite at step 3"),
        (["--what", "fault"], "3", 1, "error: [rank 3] the loss is not finite at step 3"),
        (["--what", "full"], None, 1, "error: the disk is full at 'model.safetensors'"),
        (["--what", "unseen"], None, 143, "error: stopped by SIGTERM"),
        ([], None, 0, ""),
    ],
)
def test_exit_codes_of_a_process(recipe, flags, rank, code, sentence):
    process = recipe(*flags, rank=rank)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.startswith(sentence) and err.count("\n") == (1 if sentence else 0)


def test_an_unforeseen_error_keeps_its_traceback_and_ends_in_a_sentence(recipe):
    process = recipe("--what", "bug")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" in err and err.splitlines()[-1].startswith(
        "error: an error that should not happen: KeyError: 'oops'"
    )


@pytest.mark.parametrize("signum, code, name", [(15, 143, "SIGTERM"), (2, 130, "SIGINT")])
@pytest.mark.parametrize("what, more", [("wait", ""), ("loop", "saved\n"), ("deaf", "")])
def test_signals(recipe, what, more, signum, code, name):
    process = recipe("--what", what)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    if what == "deaf":
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signum)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, more, f"error: stopped by {name}\n")
