"""A run's folder: `config.yaml`, `run.json` (what was started, with what, how it ended) and `train.jsonl`."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml

import mmbackdoor
from mmbackdoor.config import config_sha256, from_values, to_yaml
from mmbackdoor.results.record import write_text
from mmbackdoor.types import InputError, RunFault

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE_NAME = "run.json"
LOG_NAME = "train.jsonl"
SCHEMA = 1
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft", "numpy")
# Last parts of keys that change where and how fast a run goes, never what it computes.
NEUTRAL = {
    "output_dir",
    "latents_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "workers",
    "report_to",
    "resume_inexact",
    "max_bad_samples",
    "dry_run",
    "num_machines",
    "num_processes",
}
# What may be changed to go on with an old run, when that is asked for by `latest` or a checkpoint's path.
CONTINUABLE = {"max_train_steps", "num_train_epochs", "learning_rate", "lr_scheduler", "lr_warmup_steps"}
# What a checkpoint itself is compared with, and what may be changed all the same by --resume_inexact.
ORDERED = {"data"}
GO_ON = "choose another --output_dir, or go on with that run by --resume_from_checkpoint latest"
# What says which sample comes when: a checkpoint holds the order itself, and resuming compares that.
ORDERING = {"train_data", "train_batch_size", "streams", "drop_last", "train_data_upsampling_factors"}


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value that is no mapping."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `folder/run.json`. Raises `InputError` where it is missing or not ours."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{str(folder)!r} is not a run: it has no {FILE_NAME}; give the --output_dir of a run"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); choose another --output_dir") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("config"), dict):
        raise InputError(f"{str(path)!r} is not a run.json of schema {SCHEMA}; choose another --output_dir")
    return content


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed packages that decide numbers, none imported."""
    found = {"python": platform.python_version(), "mmbackdoor": mmbackdoor.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this package is imported from, `+changes` if edited; `None` outside of one."""
    package = Path(__file__).parent
    answers = []
    # ls-files first: a virtual environment inside somebody's repository is not a checkout of ours
    for arguments in (
        ["ls-files", "--error-unmatch", Path(__file__).name],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "-uno"],
    ):
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(answer.stdout.strip())
    return answers[1] + ("+changes" if answers[2] else "")


def _command() -> str:
    """The command of this process, with the interpreter's place (it names somebody's home) left out."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_change(before: dict[str, Any], after: dict[str, Any], but: set[str] = frozenset()) -> str | None:
    """What `after` gives another value, in words; `None` for nothing. Keys whose last part is in `but` may differ."""
    old, new = flat(before), flat(after)
    differing = _differing(before, after, but)
    shown = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in differing[:4])
    return (shown + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")) or None


def _differing(before: dict[str, Any], after: dict[str, Any], but: set[str]) -> list[str]:
    """Dotted keys that two configurations give other values, those whose last part is in `but` left out."""
    old, new = flat(before), flat(after)
    return [key for key in sorted(old.keys() | new.keys()) if _last(key) not in but and old.get(key) != new.get(key)]


def completed(config_type: type, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings that an older version wrote into `source`, with the defaults of those that have come since; as they
    are where they are none of `config_type`."""
    try:
        return yaml.safe_load(to_yaml(from_values(config_type, values, source)))
    except InputError:
        return values


def _other_config(folder: Path, change: str | None, way: str) -> str:
    return f"--output_dir {str(folder)!r} holds a run with another config ({change}); {way}"


def _resuming(config: dict[str, Any]) -> set[str]:
    """What it is to go on from, if anything."""
    return {value for key, value in flat(config).items() if _last(key) == "resume_from_checkpoint"} - {None}


def _refuse_other(folder: Path, recipe: str, cfg: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    """`run.json` of the same run in `folder`, or `None` for a fresh start; raises `InputError` for another run."""
    if not (folder / FILE_NAME).exists():
        return None
    # A run that ended before it made anything (a mistyped path) must not stand in the way of the next try.
    made = [path for path in folder.iterdir() if path.name not in (FILE_NAME, "config.yaml") and path.suffix != ".part"]
    if not made:
        return None
    old = read_run(folder)
    if old.get("recipe") != recipe:
        raise InputError(
            f"--output_dir {str(folder)!r} holds a run of {old.get('recipe')!r}, not of {recipe!r}; choose another one"
        )
    old["config"] = completed(type(cfg), old["config"], str(folder / FILE_NAME))
    resuming = _resuming(config)
    but = NEUTRAL | (CONTINUABLE | ORDERING if resuming else set())
    differing = _differing(old["config"], config, but)
    if differing:
        way = "choose another --output_dir or give the old values"
        if all(_last(key) in CONTINUABLE for key in differing):
            way = GO_ON
        raise InputError(_other_config(folder, config_change(old["config"], config, but), way))
    changed = [key for key in _differing(old["config"], config, set()) if _last(key) in CONTINUABLE | ORDERING]
    if changed and (folder / "model").exists():
        raise InputError(
            f"--output_dir {str(folder)!r} holds the finished model of a run with another {', '.join(changed)}; to "
            "train on, give another --output_dir and one of its checkpoints as --resume_from_checkpoint"
        )
    if resuming == {"auto"} and set(map(_last, changed)) & CONTINUABLE:
        # It goes on with what was stopped as it was; another rate or length has to be asked for.
        raise InputError(_other_config(folder, config_change(old["config"], config, NEUTRAL | ORDERING), GO_ON))
    return old


def _changed(old: dict[str, Any] | None, inputs: Mapping[str, str | None]) -> dict[str, str]:
    """The `inputs` that were others in the run `old`, and in words how. A run of before they were kept has none."""
    before = (old or {}).get("inputs", {})
    return {
        name: f"{name} was {_short(before[name])} and is {_short(digest)}"
        for name, digest in inputs.items()
        if name in before and before[name] != digest
    }


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "not known"


def _agreed(inputs: Mapping[str, str | None], accelerator: Accelerator | None) -> dict[str, str | None]:
    """`inputs` as the main process sees them: copies of files on several machines have times of their own."""
    if accelerator is None or accelerator.num_processes == 1:
        return dict(inputs)
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([dict(inputs)])[0]


@dataclass
class Run:
    """One run, on every process; only the main one writes. Use it as a context manager: leaving it sets the status
    (`finished`, `failed`, `terminated`). `previous` is the status of an earlier run of the same config in this
    folder, `None` for a fresh start. `counters` (bad samples, images made ...) go into `run.json`."""

    folder: Path
    run_id: str
    main: bool
    content: dict[str, Any]
    config_type: type
    previous: str | None = None
    counters: dict[str, Any] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _logged: bool = False

    @staticmethod
    def start(
        cfg: Any,
        recipe: str,
        output_dir: Path | str,
        accelerator: Accelerator | None = None,
        inputs: Mapping[str, str | None] | None = None,
        *,
        again: bool = False,
    ) -> Run:
        """Open `output_dir` for `cfg` (a parsed config dataclass). Raises `InputError` where the folder holds another
        run or is not writable. Without `accelerator`, rank and world size are those of the environment.

        `inputs` are digests of what the settings only name (weights, data, prompts), which may change behind its path.
        A run in the folder that had others is refused, or with `again` made anew.
        """
        folder = Path(output_dir)
        text = to_yaml(cfg)
        config = yaml.safe_load(text)
        if accelerator is None:
            main, world_size, device = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1")), "cpu"
        else:
            main, world_size, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device.type
        if any(_last(key) == "dry_run" and value for key, value in flat(config).items()):
            content = {"schema": SCHEMA, "recipe": recipe, "status": "dry run", "config": config, "resumed": []}
            return Run(folder, "dry run", False, content, type(cfg))
        old = _refuse_other(folder, recipe, cfg, config)
        if accelerator is not None:
            # Nobody may write before everybody has read: all must come to the same decision.
            accelerator.wait_for_everyone()
        inputs = _agreed(inputs or {}, accelerator)
        finished = old is not None and old.get("status") == "finished"
        finished = finished and not _differing(old["config"], config, NEUTRAL)
        if changed := _changed(old, inputs):
            said = ", ".join(changed.values())
            begun = _resuming(config) and any(folder.glob("checkpoint-*")) and changed.keys() - ORDERED
            if not again and (finished or begun or (folder / "model").exists()):
                raise InputError(
                    f"--output_dir {str(folder)!r} holds a run of what has changed since ({said}); choose another one, "
                    "or remove it to start again"
                )
            if again:
                if main and finished:
                    print(f"{str(folder)!r} was finished before something changed ({said}): again", flush=True)
                old, finished = None, False
        if finished:
            # What it says about itself stays: this call makes nothing.
            if main:
                print(f"{str(folder)!r} was finished before: nothing to do", flush=True)
            return Run(folder, old["run_id"], main, old, type(cfg), "finished")
        digest = config_sha256(cfg)
        content = {
            "schema": SCHEMA,
            "run_id": f"{folder.resolve().name}-{digest[:8]}",
            "recipe": recipe,
            "command": _command(),
            "status": "running",
            "started": _now(),
            "ended": None,
            "seconds": None,
            "world_size": world_size,
            "device": _device_name(device),
            "versions": versions(),
            "platform": platform.platform(),
            "git_commit": git_commit() if main else None,
            "config_sha256": digest,
            "config": config,
            "inputs": inputs,
            "resumed": old.get("resumed", []) if old else [],
            "counters": {},
            "error": None,
        }
        run = Run(folder, content["run_id"], main, content, type(cfg), old.get("status") if old else None)
        if main:
            write_text(folder / "config.yaml", text)
            run._save()
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `train.jsonl`. The first line of a process drops older ones of the same or later steps."""
        if not self.main:
            return
        if not self._logged:
            self._truncate(step - 1)
            self._logged = True
        line: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._began, 3)}
        for name, value in metrics.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else None
        try:
            with (self.folder / LOG_NAME).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunFault(f"writing {str(self.folder / LOG_NAME)!r} failed ({error.strerror})") from error

    def resume(self, step: int, inexact: str | None = None) -> None:
        """Note that the run goes on from `step`; lines of `train.jsonl` behind it are dropped. `inexact` says why what
        comes is not what an uninterrupted run would have done."""
        if self.main:
            self._truncate(step)
            entry = {"step": step, "at": _now(), "world_size": self.content["world_size"]}
            self.content["resumed"].append(entry | ({"inexact": inexact} if inexact else {}))
            self._save()

    def finish(self) -> None:
        self._end("finished", None)

    def fail(self, error: BaseException | str) -> None:
        self._end("failed", str(error) or type(error).__name__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.content["status"] != "running":
            return
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()
            return
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in (130, 143))
        try:
            self._end("terminated" if stopped else "failed", str(error) or type(error).__name__)
        except (RunFault, InputError):
            # A full disk is often what ended the run; the first error is the one to tell.
            return

    def _end(self, status: str, error: str | None) -> None:
        self.content.update(status=status, ended=_now(), seconds=round(time.monotonic() - self._began, 1), error=error)
        if self.main:
            self._save()

    def _save(self) -> None:
        self.content["counters"] = self.counters
        write_text(self.folder / FILE_NAME, json.dumps(self.content, indent=1, default=str) + "\n")

    def _truncate(self, step: int) -> None:
        path = self.folder / LOG_NAME
        if not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    """The step of a line of `train.jsonl`; infinity for the torn one that a killed process leaves."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _device_name(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()
