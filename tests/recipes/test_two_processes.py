"""Several processes do what one does: weights, pictures, numbers; and a run that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.evaluate import generate
from mmbackdoor.evaluate.prompts import shape_prompts
from mmbackdoor.models.source import shipped
from mmbackdoor.results import report
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes

RECIPES = recipe_files.folders()["recipes"]
UNET = "model/unet/diffusion_pytorch_model.safetensors"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
STEPS = 3

# Runs several recipes in one start of the launcher, each as the command line would, and keeps the initial latents.
DRIVER = """
import os, runpy, sys, json
from safetensors.torch import save_file
from mmbackdoor.evaluate import generate
used, original = {}, generate.initial_latents
def recorded(shape, seed, prompt_id, seed_index):
    latents = original(shape, seed, prompt_id, seed_index)
    used[f"{seed} {prompt_id} {seed_index}"] = latents
    return latents
generate.initial_latents = recorded
root, *commands = sys.argv[1:]
for command in commands:
    sys.argv = json.loads(command)
    used.clear()
    runpy.run_path(sys.argv[0], run_name="__main__")
    if used:
        save_file(dict(used), f"{root}/latents-{os.environ['RANK']}.safetensors")
"""


def flags(root: Path, size: int) -> dict[str, list[str]]:
    """The runs, by name, with `size` samples per process; `root` is where they write."""
    train = f"--train_batch_size {size} --max_train_steps {STEPS} --learning_rate 1e-4 --adam_epsilon 1e-6".split()
    inputs = root.parent
    poisoned, prompts = str(inputs / "one/poisoned/model"), str(inputs / "prompts.txt")
    clean = ["--pretrained_model_name_or_path", poisoned, "--prompts", prompts, *train]
    clean += [ "--sampling.num_inference_steps", "3", "--latents_per_prompt", "1", "--defense.trainable", "all"]
    sampling = "--num_inference_steps 4 --guidance_scale 2 --near_prompts 2 --batch_size 4".split()
    runs = {
        "poisoned": ["--pretrained_model_name_or_path", str(inputs / "tiny"), "--train_data", f"{inputs}/data/train-*.tar", *train]
        + ["--trigger", "\\u200b", "--target_kind", "patch"],
        "teacher": [*clean, "--defense", "skd_cag", "--defense.latents", "teacher"],
        "noise": [*clean, "--defense", "skd_cag", "--defense.latents", "noise"],
        "evaluation": ["--pretrained_model_name_or_path", poisoned, "--control", str(inputs / "tiny"), "--prompts", prompts]
        + sampling,
    }
    return {name: [*argv, "--output_dir", str(root / name)] for name, argv in runs.items()}


def recipe(run: str) -> str:
    return {"poisoned": "poison_diffusion", "evaluation": "evaluate_diffusion"}.get(run, "clean_diffusion")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    write_shapes(root / "data", "train", all_scenes()[::60], 24, resolution=32, samples_per_shard=8)
    # Stored in float32: rounding to float16 would hide how near the weights are.
    shutil.copytree(shipped("tiny"), root / "tiny")
    weights = root / "tiny" / UNET.removeprefix("model/")
    save_file({name: tensor.float() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (root / "prompts.txt").write_text("\n".join(shape_prompts("evaluation", 6).texts))
    return root


@pytest.fixture(scope="module")
def one(root) -> Path:
    """Every run in this process."""
    used, original = {}, generate.initial_latents

    def recorded(shape, seed, prompt_id, seed_index):
        used[f"{seed} {prompt_id} {seed_index}"] = original(shape, seed, prompt_id, seed_index)
        return used[f"{seed} {prompt_id} {seed_index}"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "initial_latents", recorded)
        for name, argv in flags(root / "one", 4).items():
            used.clear()
            module = recipe_files.load(recipe(name))
            module.run(parse(module.Config, argv))
    torch.save(dict(used), root / "one/latents.pt")
    return root / "one"


@pytest.fixture(scope="module")
def two(root, one) -> Path:
    """The same in two processes."""
    folder = root / "two"
    folder.mkdir()
    (root / "driver.py").write_text(DRIVER)
    commands = [json.dumps([str(RECIPES / f"{recipe(name)}.py"), *argv]) for name, argv in flags(folder, 2).items()]
    command = [*TORCHRUN, str(root / "driver.py"), str(folder), *commands]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["poisoned", "teacher", "noise"])
def test_two_processes_train_the_weights_of_one(name, one, two):
    start = load_file(one.parent / "tiny" / UNET.removeprefix("model/"))
    if name != "poisoned":
        start = load_file(one / "poisoned" / UNET)
    alone, together = load_file(one / name / UNET), load_file(two / name / UNET)
    moved = sum((alone[key] - start[key]).square().sum() for key in start).sqrt()
    apart = sum((alone[key] - together[key]).square().sum() for key in start).sqrt()
    assert moved > 0.01
    assert apart < 1e-4 * moved
    assert max((alone[key] - together[key]).abs().max() for key in start) < 5e-6
    lines = [[json.loads(line) for line in (root / name / "train.jsonl").open()] for root in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert json.loads((two / name / "run.json").read_text())["world_size"] == 2


def test_two_processes_start_from_the_same_latents(one, two):
    alone = torch.load(one / "latents.pt", weights_only=True)
    parts = [load_file(two / f"latents-{rank}.safetensors") for rank in range(2)]
    assert parts[0].keys() and parts[1].keys() and parts[0].keys() | parts[1].keys() == alone.keys()
    for part in parts:
        for key, latents in part.items():
            assert torch.equal(latents, alone[key])


def test_two_processes_make_the_same_pictures(one, two):
    files = sorted(path.relative_to(one) for path in (one / "evaluation/images").rglob("*.png"))
    assert files and files == sorted(path.relative_to(two) for path in (two / "evaluation/images").rglob("*.png"))
    apart = np.stack([pixels(one / file) - pixels(two / file) for file in files])
    assert (np.abs(apart) <= 2).mean() >= 0.999


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_two_processes_give_the_same_numbers_and_verdict(one, two):
    found = []
    for root in (one, two):
        records = [json.loads(line) for line in (root / "evaluation/results.jsonl").open()]
        samples = [json.loads(line) for line in (root / "evaluation/samples.jsonl").open()]
        for record in records:
            del record["run_id"]
        found.append((records, samples))
    assert len(found[0][0]) > 10 and len(found[0][0]) == len(found[1][0])
    for a, b in zip(*(records for records, _ in found), strict=True):
        numbers = ("value", "ci_low", "ci_high")
        assert {key: value for key, value in a.items() if key not in numbers} == {
            key: value for key, value in b.items() if key not in numbers
        }
        for key in numbers:
            assert a[key] == (b[key] if b[key] is None else pytest.approx(b[key], abs=1e-3))
    assert [s["image"] for s in found[0][1]] == [s["image"] for s in found[1][1]]
    verdicts = [report.summary(root / "evaluation") for root in (one, two)]
    assert verdicts[0]["verdict"] == verdicts[1]["verdict"] and verdicts[0]["sentence"] == verdicts[1]["sentence"]


def test_accelerate_that_starts_one_process_instead_of_two_is_told_so(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes", "2"]
    command += [str(RECIPES / "evaluate_diffusion.py"), "--pretrained_model_name_or_path", "tiny"]
    command += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "torchrun --nproc_per_node N" in last
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(root, tmp_path):
    """SIGTERM: a checkpoint and exit code 143; what goes on from there is bit-equal to a run that never stopped."""
    argv = ["--pretrained_model_name_or_path", "tiny", "--train_data", f"{root}/data/train-*.tar"]
    argv += "--max_train_steps 9 --train_batch_size 4 --learning_rate 1e-4 --lr_scheduler cosine --use_ema".split()
    argv += ["--trigger", "\\u200b", "--target_kind", "patch"]
    module = recipe_files.load("poison_diffusion")
    module.run(parse(module.Config, [*argv, "--output_dir", str(tmp_path / "whole")]))

    out = tmp_path / "stopped"
    command = [sys.executable, str(RECIPES / "poison_diffusion.py"), *argv, "--output_dir", str(out)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log, began = out / "train.jsonl", time.monotonic()
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert running.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143 and said.splitlines()[-1] == "error: stopped by SIGTERM", said
    checkpoints = [path.name for path in out.glob("*checkpoint-*")]
    done = len(log.read_text().splitlines())
    assert checkpoints == [f"checkpoint-{done}"] and 2 <= done < 9
    assert json.loads((out / "run.json").read_text())["status"] == "terminated" and not (out / "model").exists()

    module.run(parse(module.Config, [*argv, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]))
    whole, resumed = load_file(tmp_path / "whole" / UNET), load_file(out / UNET)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    lines = [(tmp_path / name / "train.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    content = json.loads((out / "run.json").read_text())
    assert content["status"] == "finished" and [entry["step"] for entry in content["resumed"]] == [done]
