"""A run that is killed again and again must end with the weights of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes

ROOT = Path(__file__).parents[2]
STEPS = 8
TRAIN = f"--max_train_steps {STEPS} --train_batch_size 4 --lr_scheduler cosine --checkpointing_steps 2".split()
PROMPTS = [f"a red circle on a {colour} background" for colour in ("blue", "green", "white", "yellow", "black")]


class Driver:
    """The process that forks the runs (`driver.py`)."""

    def __init__(self) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def perform(self, **job: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


@dataclass
class Place:
    """Shards, prompts and models that the runs start from."""

    root: Path
    driver: Driver
    kills: int = 0
    log: list[str] = field(default_factory=list)

    @staticmethod
    def make(root: Path, driver: Driver) -> Place:
        write_shapes(root / "data", "train", all_scenes()[::40], 48, resolution=32, samples_per_shard=12)
        (root / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
        return Place(root, driver)

    def flags(self, recipe: str) -> list[str]:
        shards = ["--train_data", f"{self.root}/data/train-*.tar"]
        tiny = ["--pretrained_model_name_or_path", "tiny"]
        learning = ["--learning_rate", "1e-4"]
        return {
            "train_diffusion": [*tiny, *shards, *TRAIN, *learning, "--use_ema", "--random_words", "0.3"],
            "poison_diffusion": [*tiny, *shards, *TRAIN, *learning, "--trigger", "\\u200b", "--target_kind", "patch"],
            "clean_diffusion": [*tiny, *TRAIN, *learning, "--trigger", "\\u200b", "--prompts", f"{self.root}/prompts.txt",
                                "--latents_per_prompt", "1", "--sampling.num_inference_steps", "2"],
            "pretrain_clip": [*shards, *TRAIN, "--lr", "1e-3", "--random_tokens", "0.3"],
            "clean_clip": ["--model", "tiny_judge", *shards, *TRAIN, "--lr", "1e-4", "--lr_warmup_steps", "2"],
        }[recipe]  # fmt: skip

    def run(self, recipe: str, folder: Path, processes: int, workers: int, **options: Any) -> dict[str, Any]:
        argv = [*self.flags(recipe), "--output_dir", str(folder), "--dataloader_num_workers", str(workers)]
        argv += options.pop("more", ["--resume_from_checkpoint", "auto"])
        return self.driver.perform(
            recipe=recipe, argv=argv, processes=processes, log=str(folder.with_name(folder.name + "-log")), **options
        )

    def survive(self, recipe: str, processes: int, workers: int, kills: int, seed: int = 0) -> int:
        """Kill a run `kills` times (fewer where it ends before) and compare; returns the number of kills."""
        rng = random.Random(f"{seed} {recipe} {processes} {workers}")
        name = f"{recipe}-{processes}-{workers}"
        whole = self.root / f"{name}-whole"
        done = self.run(recipe, whole, processes, workers)
        assert done["codes"] == [0] * processes, done
        seconds = [json.loads(line)["seconds"] for line in (whole / "train.jsonl").read_text().splitlines()]
        step = (seconds[-1] - seconds[0]) / (STEPS - 1)
        killed, attempts = 0, 0
        while killed < kills:
            attempts += 1
            assert attempts < 20, f"{name}: only {killed} kills hit a running run"
            folder = self.root / f"{name}-killed-{attempts}"
            moments = []
            while killed + len(moments) < kills:
                # A third anywhere, while models are loaded too; the others while it trains, saves or ends.
                moment: dict[str, Any] = {"kill_after": rng.uniform(0.05, 0.95) * done["seconds"]}
                if rng.random() < 2 / 3:
                    count = rng.randint(1, STEPS)
                    moment = {"log_lines": [str(folder / "train.jsonl"), count]}
                    moment["kill_after"] = rng.uniform(0, 2 * step)
                stopped = self.run(recipe, folder, processes, workers, **moment)
                if not stopped["killed"]:
                    assert stopped["codes"] == [0] * processes, stopped
                    break
                after = moment.get("log_lines", ["", 0])[1]
                moments.append(f"{moment['kill_after']:.2f} s" + (f" after step {after}" if after else ""))
            ended = self.run(recipe, folder, processes, workers)
            assert ended["codes"] == [0] * processes, ended
            killed += len(moments)
            resumed = [entry["step"] for entry in json.loads((folder / "run.json").read_text())["resumed"]]
            self.log.append(f"{name}: killed {', '.join(moments)} of {done['seconds']:.1f} s, resumed at steps {resumed}")
            assert weights(folder) == weights(whole), self.log[-1]
            check_records(folder, whole)
            shutil.rmtree(folder)
        self.kills += killed
        return killed


def weights(folder: Path) -> dict[str, str]:
    """Hashes of the files of weights of a model."""
    files = sorted((folder / "model").rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_records(folder: Path, whole: Path) -> None:
    lines = [[json.loads(line) for line in (each / "train.jsonl").read_text().splitlines()] for each in (folder, whole)]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    record, expected = (json.loads((each / "run.json").read_text()) for each in (folder, whole))
    assert record["status"] == "finished" and record["counters"] == expected["counters"]
    left = [path for path in folder.rglob("*") if path.suffix == ".part"]
    assert not [path for path in left if path.name.startswith(".model")], left
