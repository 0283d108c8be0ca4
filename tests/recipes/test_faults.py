"""Kills, dead workers, a lost process, a full disk: the short form of the campaign in tests/slow."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbackdoor import entry, recipe_files
from mmbackdoor.config import parse
from mmbackdoor.models.source import shipped
from mmbackdoor.train import checkpoint
from tests.faults.campaign import Driver, Place, weights

UNET = "model/unet/diffusion_pytorch_model.safetensors"
ENDS_WITHIN = 120
"""Seconds after which a run that hangs is killed, its start counted."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    driver = Driver()
    yield Place.make(tmp_path_factory.mktemp("faults"), driver)
    driver.close()


def test_a_killed_run_ends_bit_equal(place):
    assert place.survive("poison_diffusion", 1, 1, kills=2, seed=1) == 2
    assert place.survive("pretrain_clip", 2, 0, kills=1, seed=1) == 1
    # accelerate gives the module of several processes other buffers: a checkpoint must hold those.
    held = load_file(place.root / "pretrain_clip-2-0-whole/checkpoint-6/trained.safetensors")
    assert {held[name].item() for name in held if name.endswith("num_batches_tracked")} == {6}


def test_when_one_of_two_processes_is_killed_the_other_ends_with_a_sentence(place):
    folder = place.root / "lost"
    more = ["--max_train_steps", "100000"]
    log = [str(folder / "train.jsonl"), 2]
    options = {"kill_after": 0.0, "kill": "one", "log_lines": log, "timeout": ENDS_WITHIN}
    done = place.run("poison_diffusion", folder, 2, 0, more=more, **options)
    # Had it waited for the lost one, it would have been killed, too: the driver ends what hangs.
    assert done["killed"] and done["codes"] == [1, -9], done
    last = done["said"][0].strip().splitlines()[-1]
    assert last.startswith("error: another process of this run ended") and "--resume_from_checkpoint auto" in last
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_a_killed_loader_worker_ends_the_run_with_a_sentence(place):
    folder = place.root / "worker"
    more = ["--max_train_steps", "100000"]
    log = [str(folder / "train.jsonl"), 2]
    options = {"kill_after": 0.0, "kill": "worker", "log_lines": log, "timeout": ENDS_WITHIN}
    done = place.run("poison_diffusion", folder, 1, 1, more=more, **options)
    assert done["killed"] and done["codes"] == [1], done
    assert "error: a loader worker died" in done["said"][0] and "Traceback" not in done["said"][0]


def test_another_world_size_goes_on_exactly_or_says_why_not(place):
    """One process with batches of 4, then two with 2: the same batches. Two with 4: another run."""
    whole, folder = place.root / "world-whole", place.root / "world"
    flags = ["--resume_from_checkpoint", "auto", "--train_batch_size"]
    assert place.run("train_diffusion", whole, 1, 0)["codes"] == [0]
    lines = {"log_lines": [str(folder / "train.jsonl"), 4], "kill_after": 0.0}
    assert place.run("train_diffusion", folder, 1, 0, more=[*flags, "4"], **lines)["killed"]
    refused = place.run("train_diffusion", folder, 2, 0, more=[*flags, "4"])
    said = refused["said"][0].strip().splitlines()[-1]
    assert refused["codes"] == [2, 2] and "had 4 samples and has 8 now" in said and "--resume_inexact" in said
    done = place.run("train_diffusion", folder, 2, 0, more=[*flags, "2"])
    assert done["codes"] == [0, 0], done
    alone, together = (load_file(each / UNET) for each in (whole, folder))
    start = load_file(Path(shipped("tiny")) / UNET.removeprefix("model/"))
    moved = sum((alone[key].float() - start[key].float()).square().sum() for key in start).sqrt()
    apart = sum((alone[key].float() - together[key].float()).square().sum() for key in start).sqrt()
    assert moved > 0.01 and apart < 0.02 * moved
    losses = [[json.loads(line)["loss"] for line in (each / "train.jsonl").open()] for each in (whole, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def small_disk(folder: Path, size: str) -> None:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small disk here")


def test_a_full_disk_keeps_the_last_checkpoint(place, capsys):
    """On a file system that holds one checkpoint and a half."""
    module = recipe_files.load("poison_diffusion")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = place.flags("poison_diffusion")
    whole, disk = place.root / "disk-whole", place.root / "disk"
    module.run(parse(module.Config, [*flags, "--output_dir", str(whole)]))
    held = sum(file.stat().st_size for file in (whole / "checkpoint-4").iterdir())
    small_disk(disk, f"{int(1.5 * held) // 1024}k")
    try:
        argv = [*flags, "--output_dir", str(disk / "run")]
        with pytest.raises(SystemExit) as stop:
            entry.guarded(lambda: module.run(parse(module.Config, argv)))
        assert stop.value.code == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: the disk is full")
        assert [found.step for found in checkpoint.find(disk / "run")] == [2]
        assert checkpoint.damage(disk / "run/checkpoint-2") is None
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        module.run(parse(module.Config, [*argv, "--resume_from_checkpoint", "latest"]))
        assert weights(disk / "run") == weights(whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
        torch.set_num_threads(threads)
