from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import pytest

from mmbackdoor.results.run import Run, read_run
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class Train:
    learning_rate: float = 1e-3
    max_train_steps: int = 10
    resume_from_checkpoint: str | None = None


@dataclass(frozen=True)
class Config:
    train: Train = field(default_factory=Train)
    output_dir: str = "runs/x"
    seed: int = 0


def start(folder: Path, cfg: Config, recipe: str = "clean_diffusion") -> Run:
    return Run.start(cfg, recipe, folder, None)


def used(folder: Path, cfg: Config) -> None:
    with start(folder, cfg) as run:
        run.log(1, {"loss": 0.5})


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def test_a_run_s_folder_says_what_was_run(tmp_path: Path) -> None:
    cfg = Config(seed=3)
    with start(tmp_path / "a" / "b", cfg) as run:
        assert read_run(run.folder)["status"] == "running"
        run.counters["bad_samples"] = 2
        run.log(1, {"loss": 0.25, "lr": 1})
        run.log(2, {"loss": float("nan")})
    content = read_run(run.folder)
    assert content["status"] == "finished" and content["error"] is None and content["counters"] == {"bad_samples": 2}
    assert content["config"]["seed"] == 3 and content["config"]["train"]["max_train_steps"] == 10
    assert len(content["config_sha256"]) == 64 and content["run_id"] == f"b-{content['config_sha256'][:8]}"
    assert content["world_size"] == 1 and content["command"].startswith("python ")
    assert {"python", "mmbackdoor", "torch", "diffusers"} <= content["versions"].keys()
    assert content["ended"] >= content["started"] and content["seconds"] >= 0
    assert [(row["step"], row["loss"]) for row in log_of(run.folder)] == [(1, 0.25), (2, None)]
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.yaml", "run.json", "train.jsonl"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "terminated"),
        (SystemExit(143), "terminated"),
        (SystemExit(1), "failed"),
        (RuntimeError("loss is nan"), "failed"),
        (SystemExit(0), "finished"),
    ],
)
def test_how_it_ended_is_written_and_the_error_goes_on(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), start(tmp_path, Config()):
        raise error
    content = read_run(tmp_path)
    assert content["status"] == status
    if status == "failed":
        assert content["error"] == str(error)


def test_another_config_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    used(tmp_path, Config())
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(InputError, match=r"seed was 0 and is 1.*another --output_dir"):
        start(tmp_path, Config(seed=1))
    with pytest.raises(InputError, match=r"max_train_steps was 10 and is 20.*--resume_from_checkpoint"):
        start(tmp_path, Config(Train(max_train_steps=20)))
    with pytest.raises(InputError, match="seed"):
        start(tmp_path, Config(Train(resume_from_checkpoint="auto"), seed=1))
    with pytest.raises(InputError, match="holds a run of 'clean_diffusion'"):
        start(tmp_path, Config(), "poison_diffusion")
    assert (tmp_path / "run.json").read_text() == before


def test_the_same_config_may_run_again_and_a_longer_one_may_resume(tmp_path: Path) -> None:
    used(tmp_path, Config())
    assert start(tmp_path, replace(Config(), output_dir="elsewhere")).previous == "finished"
    run = start(tmp_path, Config(Train(max_train_steps=20, resume_from_checkpoint="latest")))
    run.resume(1)
    run.finish()
    assert read_run(tmp_path)["resumed"][0]["step"] == 1
    assert start(tmp_path, Config(Train(max_train_steps=20))).content["resumed"] == read_run(tmp_path)["resumed"]


def test_auto_goes_on_with_what_was_stopped_and_not_with_another_rate(tmp_path: Path) -> None:
    """Else half of a run would have one rate and half another, under the name of the second."""
    used(tmp_path, Config(Train(resume_from_checkpoint="auto")))
    with pytest.raises(InputError, match=r"max_train_steps was 10 and is 20.*--resume_from_checkpoint latest"):
        start(tmp_path, Config(Train(max_train_steps=20, resume_from_checkpoint="auto")))
    assert start(tmp_path, Config(Train(resume_from_checkpoint="auto"))).previous == "finished"
    assert start(tmp_path, Config(Train(max_train_steps=20, resume_from_checkpoint="latest"))).previous == "finished"


def test_a_finished_model_is_not_trained_longer_in_its_folder(tmp_path: Path) -> None:
    used(tmp_path, Config())
    (tmp_path / "model").mkdir()
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(InputError, match="another train.max_train_steps.*another --output_dir"):
        start(tmp_path, Config(Train(max_train_steps=20, resume_from_checkpoint="latest")))
    assert (tmp_path / "run.json").read_text() == before


def test_a_run_that_made_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(InputError), start(tmp_path, Config()):
        raise InputError("no such prompts file")
    assert start(tmp_path, Config(seed=1)).previous is None


def test_the_log_continues_at_the_resumed_step(tmp_path: Path) -> None:
    with start(tmp_path, Config()) as run:
        for step in range(6):
            run.log(step, {"loss": 1.0})
    with (tmp_path / "train.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    run = start(tmp_path, Config())
    run.resume(3)
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2, 3]
    run.log(3, {"loss": 2.0})
    run.log(4, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in log_of(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with start(tmp_path / "run", Config()) as run:
        run.log(1, {"loss": 1.0})
        run.resume(1)
    assert not (tmp_path / "run").exists() and run.content["world_size"] == 2


def test_places_that_cannot_be_a_run_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="writable --output_dir"):
        start(tmp_path / "file" / "run", Config())
    with pytest.raises(InputError, match="is not a run"):
        read_run(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    for text in ("{", "[]", '{"schema": 9, "config": {}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match="run.json"):
            start(tmp_path, Config())


def test_starting_imports_nothing_heavy() -> None:
    heavy = "('torch', 'diffusers', 'transformers')"
    code = f"import sys, mmbackdoor.results.run; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_of_before_a_setting_existed_is_the_same_run(tmp_path: Path) -> None:
    used(tmp_path, Config())
    settings = [("train", Train, field(default_factory=Train)), ("output_dir", str, "runs/x"), ("seed", int, 0)]
    later = make_dataclass("Config", [*settings, ("milestones", int, 4)], frozen=True)
    assert start(tmp_path, later()).previous == "finished"
    with pytest.raises(InputError, match="milestones was 4 and is 5"):
        start(tmp_path, later(milestones=5))


A, B = {"model": "a" * 64, "data": "c" * 64}, {"model": "b" * 64, "data": "c" * 64}


def test_what_was_measured_is_measured_again_where_an_input_changed(tmp_path: Path, capsys) -> None:
    with Run.start(Config(), "evaluate_clip", tmp_path, None, A, again=True) as run:
        run.log(1, {"loss": 0.5})
    assert Run.start(Config(), "evaluate_clip", tmp_path, None, A, again=True).previous == "finished"
    run = Run.start(Config(), "evaluate_clip", tmp_path, None, B, again=True)
    assert "model was aaaaaaaaaaaa and is bbbbbbbbbbbb" in capsys.readouterr().out
    assert run.previous is None and read_run(tmp_path)["status"] == "running"
    run.finish()
    assert read_run(tmp_path)["inputs"] == B
    assert Run.start(Config(), "evaluate_clip", tmp_path, None, B, again=True).previous == "finished"


def test_what_was_trained_on_other_inputs_is_refused(tmp_path: Path) -> None:
    with Run.start(Config(), "clean_clip", tmp_path, None, A) as run:
        run.log(1, {"loss": 0.5})
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(InputError, match="model was aaaaaaaaaaaa and is bbbbbbbbbbbb.*choose another one"):
        Run.start(Config(), "clean_clip", tmp_path, None, B)
    assert (tmp_path / "run.json").read_text() == before
    assert Run.start(Config(), "clean_clip", tmp_path, None, A).previous == "finished"


def test_a_run_that_does_not_say_what_it_was_made_from_is_taken_as_it_is(tmp_path: Path) -> None:
    used(tmp_path, Config())
    content = json.loads((tmp_path / "run.json").read_text())
    del content["inputs"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert Run.start(Config(), "clean_diffusion", tmp_path, None, A).previous == "finished"


def test_a_checkpoint_is_not_gone_on_from_with_another_model(tmp_path: Path) -> None:
    """The frozen part would be another one's. What is read a checkpoint compares itself."""
    auto, anew = Config(Train(resume_from_checkpoint="auto")), Config()
    with pytest.raises(KeyboardInterrupt), Run.start(auto, "clean_clip", tmp_path, None, A) as run:
        run.log(1, {"loss": 0.5})
        (tmp_path / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="model was"):
        Run.start(auto, "clean_clip", tmp_path, None, B)
    assert Run.start(auto, "clean_clip", tmp_path, None, A | {"data": "d" * 64}).previous == "terminated"
    assert Run.start(anew, "clean_clip", tmp_path, None, B).previous == "running"
