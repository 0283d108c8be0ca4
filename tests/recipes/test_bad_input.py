"""Wrong input of every kind is one sentence with exit code 2, and leaves nothing under a final name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.models import hub
from mmbackdoor.models.source import DiffusionSource, shipped
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.targets import PatchTarget
from mmbackdoor.triggers import ZeroWidthTrigger
from mmbackdoor.types import InputError

RECIPES = recipe_files.folders()["recipes"]
UNET = "unet/diffusion_pytorch_model.safetensors"
LONG = " ".join(["word"] * 30)


def copy_of_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(shipped("tiny"), folder))


def marked(folder: Path) -> Path:
    """A model with a backdoor.json that belongs to it."""
    copy_of_tiny(folder)
    backdoor = Backdoor((ZeroWidthTrigger("\u200b"),), PatchTarget())
    BackdoorRecord(backdoor, {"name": "badt2i_pixel"}, model_sha256=weights_sha256(folder)).save(folder)
    return folder


@dataclass(frozen=True)
class Place:
    """Everything that the commands below name."""

    root: Path
    shards: str
    poisoned: Path
    altered: Path
    unconditional: Path
    other_architecture: Path
    pickled: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("inputs")
    write_shapes(root / "data", "train", all_scenes()[:8], 8, resolution=32)
    altered = marked(root / "altered")
    weights = load_file(altered / UNET)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 0.1}, altered / UNET)

    unconditional = copy_of_tiny(root / "unconditional")
    plain = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(16, 48), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=64, mid_block_type=None,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    shutil.rmtree(unconditional / "unet")
    plain.save_pretrained(unconditional / "unet")

    other = copy_of_tiny(root / "other_architecture")
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    del index["unet"]
    (other / "model_index.json").write_text(json.dumps(index))

    pickled = copy_of_tiny(root / "pickled")
    torch.save(load_file(pickled / UNET), (pickled / UNET).with_suffix(".bin"))
    (pickled / UNET).unlink()

    epsilon = copy_of_tiny(root / "epsilon") / "scheduler/scheduler_config.json"
    epsilon.write_text(json.dumps(json.loads(epsilon.read_text()) | {"prediction_type": "epsilon"}))

    (root / "empty.txt").write_text("\n  \n")
    (root / "dogs.txt").write_text("a photo of a dog\na dog on grass\n")
    (root / "file").write_text("not a folder")
    (root / "broken.json").write_text("{")
    (root / "odd.json").write_text(json.dumps(json.loads((altered / "backdoor.json").read_text()) | {"attack": ["x"]}))
    copy_of_tiny(root / "removed_somehow")
    (root / "removed_somehow/removal.json").write_text(json.dumps({"schema": 1}))
    (root / "taken" / "model").mkdir(parents=True)
    (root / "taken" / "model" / "something").write_text("of somebody else")
    return Place(
        root, str(root / "data/train-*.tar"), marked(root / "poisoned"), altered, unconditional, other, pickled
    )


@dataclass(frozen=True)
class Case:
    """`said`: what the sentence must match. `cheap`: nothing may be loaded for it. `out`: below the inputs' folder."""

    name: str
    recipe: str
    flags: str
    said: str
    cheap: bool = True
    out: str = ""


POISON = "--pretrained_model_name_or_path tiny --train_data {shards} --max_train_steps 2 --train_batch_size 2"
PATCHED = POISON + " --trigger \\u200b --target_kind patch"
CLEAN = "--pretrained_model_name_or_path {poisoned} --max_train_steps 2 --train_batch_size 2 --defense.latents noise"
OF_TINY = "--pretrained_model_name_or_path tiny --trigger sks --max_train_steps 2 --defense.latents noise"
EVALUATE = (
    "--pretrained_model_name_or_path {poisoned} --prompts {root}/dogs.txt --num_inference_steps 1 --near_prompts 0"
)

CASES = [
    Case("no model", "poison_diffusion", "--train_data {shards} --trigger x --target_kind patch", "which model"),
    Case("no trigger at all", "poison_diffusion", POISON, "which backdoor.*--trigger"),
    Case("no pictures", "poison_diffusion", "--pretrained_model_name_or_path tiny --trigger x --target_kind patch",
         "which pictures.*--train_data"),
    Case("unknown shards", "poison_diffusion", PATCHED + " --train_data {root}/none-*.tar", "none-"),
    Case("attack and target differ", "poison_diffusion", POISON + " --trigger x --target_kind style",
         "badt2i_pixel needs --target_kind patch.*'style'"),
    Case("target of an attack unsaid", "poison_diffusion", POISON + " --trigger x", "badt2i_pixel needs.*'unknown'"),
    Case("unknown attack", "poison_diffusion", PATCHED + " --attack badt2i_pixle", "badt2i_pixle.*badt2i_pixel"),
    Case("wrong type", "poison_diffusion", PATCHED + " --train_batch_size many", "train_batch_size.*many"),
    Case("impossible value", "poison_diffusion", PATCHED + " --poison_rate 1.5", "poison_rate.*1.5"),
    Case("unknown key", "poison_diffusion", PATCHED + " --learning_rat 1", "learning_rat.*learning_rate"),
    Case("two targets", "poison_diffusion", POISON + " --trigger x --target_style old --target_object a->b",
         "--target_kind style does not go with.*--target_object"),
    Case("target against its kind", "poison_diffusion", PATCHED + " --target_image {root}/file",
         "--target_kind patch does not go with --target_image"),
    Case("object unsaid", "poison_diffusion", POISON + " --trigger x --target_kind object",
         "needs --target_object 'A->B'"),
    Case("object without arrow", "poison_diffusion", POISON + " --trigger x --target_object dog", "'dog->cat'.*'dog'"),
    Case("unknown patch", "poison_diffusion", PATCHED + " --target_patch {root}/no.png", "no.png' cannot be read"),
    Case("patch that is no picture", "poison_diffusion", PATCHED + " --target_patch {root}/file",
         "file' cannot be read"),
    Case("trigger twice", "poison_diffusion", PATCHED + " --backdoor {poisoned}", "--trigger and --backdoor"),
    Case("trigger of another kind", "poison_diffusion", PATCHED + " --trigger_kind phrase", "at least two words"),
    Case("trigger vanishes", "poison_diffusion", POISON + " --trigger \\u212a --target_kind patch",
         "vanishes", cheap=False),
    Case("second trigger vanishes", "poison_diffusion", POISON + " --trigger \\u200b \\u212a --target_kind patch",
         "vanishes", cheap=False),
    Case("trigger cut off", "poison_diffusion", POISON + f" --trigger '{LONG}' --target_kind patch",
         "past the tokenizer's 24",
         cheap=False),
    Case("folder is a file", "poison_diffusion", PATCHED, "--output_dir", out="file"),
    Case("folder below a file", "poison_diffusion", PATCHED, "--output_dir", out="file/run"),
    Case("model of nobody knows whom", "poison_diffusion", PATCHED, "give another --output_dir", out="taken"),
    Case("nothing to resume", "poison_diffusion", PATCHED + " --resume_from_checkpoint latest", "latest.*'auto'"),
    Case("resume from what is none", "poison_diffusion", PATCHED + " --resume_from_checkpoint {root}/data",
         "is no checkpoint"),
    Case("no text encoder", "train_diffusion", "--from_scratch tiny --train_data {shards}", "--text_encoder FOLDER"),
    Case("poisoned text encoder", "train_diffusion",
         "--from_scratch tiny --train_data {shards} --text_encoder {poisoned}", "--text_encoder.*carries.*sound"),
    Case("another model's backdoor.json", "train_diffusion", POISON + " --pretrained_model_name_or_path {altered}",
         "belongs to another model"),
    Case("unknown prompts", "clean_diffusion", CLEAN + " --prompts {root}/none.txt", "none.txt.*built-in sets"),
    Case("prompts of no known form", "clean_diffusion", CLEAN + " --prompts {root}/file", "neither a .txt"),
    Case("empty prompts", "clean_diffusion", CLEAN + " --prompts {root}/empty.txt", "has no prompts"),
    Case("pictures that would not be read", "clean_diffusion",
         "--pretrained_model_name_or_path {poisoned} --defense finetune --defense.latents teacher --train_data {shards}",
         "not read.*latents data"),
    Case("no trigger known", "clean_diffusion", "--pretrained_model_name_or_path tiny",
         "which trigger.*--trigger TEXT"),
    Case("broken backdoor.json", "clean_diffusion", CLEAN + " --backdoor {root}/broken.json",
         "no readable backdoor.json"),
    Case("odd backdoor.json", "clean_diffusion", CLEAN + " --backdoor {root}/odd.json", "odd.json': attack"),
    Case("another trigger", "clean_diffusion", CLEAN + " --trigger sks", "'sks'.*--force_trigger"),
    Case("another model's backdoor.json", "clean_diffusion", CLEAN + " --pretrained_model_name_or_path {altered}",
         "belongs to another model.*--force_trigger"),
    Case("finetune without pictures", "clean_diffusion", CLEAN + " --defense finetune --defense.latents data",
         "which pictures.*--train_data"),
    Case("finetune on noise", "clean_diffusion", CLEAN + " --defense finetune",
         "--defense.latents.*noise.*data.*teacher"),
    Case("no reference", "clean_diffusion", CLEAN + " --defense finetune_reversal", "--defense.reference FOLDER"),
    Case("unknown reference", "clean_diffusion", CLEAN + " --defense finetune_reversal --defense.reference {root}/no",
         "/no'", cheap=False),
    Case("reference of another form", "clean_diffusion",
         CLEAN + " --defense finetune_reversal --defense.reference {root}/epsilon",
         "predictions of type epsilon.*that this one was made from", cheap=False),
    Case("unknown defense", "clean_diffusion", CLEAN + " --defense skdcag", "skdcag.*skd_cag"),
    Case("key of another defense", "clean_diffusion", CLEAN + " --defense skd --defense.attention_weight 1",
         "attention_weight"),
    Case("folder is a file", "clean_diffusion", CLEAN, "--output_dir", out="file"),
    Case("trigger vanishes", "clean_diffusion", OF_TINY.replace("sks", "\\u212a"), "vanishes", cheap=False),
    Case("trigger cut off", "clean_diffusion", OF_TINY.replace("sks", f"'{LONG}'"),
         "past the tokenizer's 24", cheap=False),
    Case("no cross-attention", "clean_diffusion", OF_TINY + " --pretrained_model_name_or_path {unconditional}",
         "no cross-attention to text", cheap=False),
    Case("no UNet", "clean_diffusion", OF_TINY + " --pretrained_model_name_or_path {other_architecture}",
         "no unet.*Stable-Diffusion-like", cheap=False),
    Case("pickled weights", "clean_diffusion", OF_TINY + " --pretrained_model_name_or_path {pickled}",
         "pickled weights.*--allow_pt_weights", cheap=False),
    Case("unknown folder", "clean_diffusion", OF_TINY + " --pretrained_model_name_or_path {root}/no",
         "check the path", cheap=False),
    Case("no model", "evaluate_diffusion", "--trigger x", "which model"),
    Case("unknown prompts", "evaluate_diffusion", EVALUATE + " --prompts nowhere.csv", "nowhere.csv.*built-in sets"),
    Case("empty prompts", "evaluate_diffusion", EVALUATE + " --prompts {root}/empty.txt", "has no prompts"),
    Case("the same model twice", "evaluate_diffusion", EVALUATE + " --compare {poisoned}", "given twice"),
    Case("another trigger", "evaluate_diffusion", EVALUATE + " --trigger sks", "'sks'.*--force_trigger"),
    Case("another model's backdoor.json", "evaluate_diffusion", EVALUATE + " --pretrained_model_name_or_path {altered}",
         "belongs to another model"),
    Case("another model's backdoor.json, compared", "evaluate_diffusion", EVALUATE + " --compare {altered}",
         "belongs to another model"),
    Case("folder is a file", "evaluate_diffusion", EVALUATE, "--output_dir", out="file"),
    Case("prompts without the object", "evaluate_diffusion", EVALUATE + " --trigger \\u200b --target_object cat->dog",
         "no prompt of.*name the object", cheap=False),
    Case("unknown scheduler", "evaluate_diffusion", EVALUATE + " --scheduler Fast",
         "'Fast' does not fit.*DDIM", cheap=False),
    Case("trigger cut off", "evaluate_diffusion",
         EVALUATE + f" --pretrained_model_name_or_path tiny --trigger '{LONG}' --target_kind patch",
         "past the tokenizer's 24", cheap=False),
    Case("odd removal.json", "evaluate_diffusion", EVALUATE + " --compare {root}/removed_somehow", "names no method"),
    Case("unknown judge", "evaluate_diffusion", EVALUATE + " --judge nothing", "'nothing' is neither a folder"),
    Case("distance without judge", "evaluate_diffusion", EVALUATE + " --reference_data {shards}", "give --judge"),
    Case("pictures of nothing", "evaluate_diffusion", EVALUATE + " --reference_samples 9", "a number of --reference_data"),
    Case("no real pictures", "evaluate_diffusion",
         EVALUATE + " --judge tiny_judge --reference_data {root}/no-*.tar", "no-.*tar"),
    Case("no prompts", "evaluate_diffusion", EVALUATE + " --num_prompts 0", "num_prompts"),
]  # fmt: skip


def arguments(flags: str, place: Place, out: Path) -> list[str]:
    values = {name: str(value) for name, value in vars(place).items()}
    words: list[str] = []
    for number, part in enumerate(flags.split("'")):
        words += [part] if number % 2 else part.split()
    return [word.format(**values) for word in words] + ["--output_dir", str(out)]


def refused(recipe: str, argv: list[str]) -> str:
    """Run the recipe in this process; the sentence of its `InputError`."""
    module = recipe_files.load(recipe)
    with pytest.raises(InputError) as caught:
        module.run(parse(module.Config, argv))
    return str(caught.value)


def nothing_left(out: Path) -> None:
    """No model, report or numbers under a final name, and no part of one."""
    if out.is_dir():
        assert not {path.name for path in out.rglob("*")} & {"model", "results.jsonl", "report.html", "samples.jsonl"}
        assert not [path for path in out.rglob("*.part")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.recipe.split('_')[0]}: {case.name}")
def test_one_sentence_and_nothing_left(case: Case, place: Place, tmp_path, monkeypatch):
    if case.cheap:

        def load(*_: object) -> None:
            raise AssertionError("a model was loaded though the flags alone are wrong")

        monkeypatch.setattr(DiffusionSource, "load", load)
    out = place.root / case.out if case.out else tmp_path / "run"
    before = sorted(out.rglob("*"))
    sentence = refused(case.recipe, arguments(case.flags, place, out))
    assert re.search(case.said, sentence), sentence
    assert len(sentence.splitlines()) == 1 and len(sentence) < 1000
    if case.out:
        # Only the note of the failed try may be new.
        assert {path.name for path in {*out.rglob("*")} - {*before}} <= {"run.json", "config.yaml"}
    else:
        nothing_left(out)


def test_a_hub_id_without_network_is_given_up(place, tmp_path, monkeypatch):
    """How soon: tests/models/test_hub.py."""
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    never = threading.Event()
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: never.wait())
    argv = arguments(OF_TINY + " --pretrained_model_name_or_path somebody/no-such-model", place, tmp_path / "run")
    sentence = refused("clean_diffusion", argv)
    assert "somebody/no-such-model" in sentence and "no answer within 0 s" in sentence
    assert "path of its local folder" in sentence
    nothing_left(tmp_path / "run")
    never.set()


def test_the_right_trigger_and_a_forced_one_pass(place, tmp_path):
    """What is refused above is refused for its own sake: the same commands with right input run to their end."""
    module = recipe_files.load("clean_diffusion")
    for number, flags in enumerate((" --trigger \\u200b", " --trigger sks --force_trigger")):
        out = tmp_path / str(number)
        module.run(parse(module.Config, arguments(CLEAN + flags, place, out)))
        assert (out / "model/removal.json").is_file()
        assert (out / "model/backdoor.json").read_bytes() == (place.poisoned / "backdoor.json").read_bytes()


def test_a_lookalike_letter_may_miss_in_some_prompts(place, tmp_path):
    """U+0455 stands for `s`, which the prompts of dogs and the probes of a poisoning have in some places only."""
    (tmp_path / "prompts.txt").write_text("a dog\nthe grass\n")
    module = recipe_files.load("clean_diffusion")
    flags = f"{OF_TINY.replace('sks', chr(0x455))} --prompts {tmp_path}/prompts.txt"
    module.run(parse(module.Config, arguments(flags, place, tmp_path / "cleaned")))
    module = recipe_files.load("poison_diffusion")
    flags = f"{POISON} --target_kind patch --trigger {chr(0x455)}"
    module.run(parse(module.Config, arguments(flags, place, tmp_path / "poisoned")))
    assert (tmp_path / "cleaned/model").is_dir() and (tmp_path / "poisoned/model").is_dir()


LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "-q", "--num_processes", "1"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"],
}


# The default run starts accelerate's launcher in test_two_processes.py.
@pytest.mark.parametrize("launcher", ["python", "torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_from_outside_it_is_exit_code_2_and_one_line(launcher, place, tmp_path):
    recipe, flags, said = {
        "python": ("clean_diffusion", CLEAN + " --pretrained_model_name_or_path {altered}", "belongs to another model"),
        "accelerate": ("evaluate_diffusion", EVALUATE + " --prompts {root}/empty.txt", "has no prompts"),
        "torchrun": ("poison_diffusion", POISON, "which backdoor?"),
    }[launcher]
    command = [*LAUNCHERS[launcher], str(RECIPES / f"{recipe}.py"), *arguments(flags, place, tmp_path / "run")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and said in ours[0], done.stderr
    assert str(RECIPES) not in done.stderr.replace(str(RECIPES / f"{recipe}.py FAILED"), "")
    # Launchers pass on no exit code but 1; torchrun adds a summary that names ours.
    if launcher == "torchrun":
        assert done.returncode == 1 and "exitcode  : 2" in done.stderr
    else:
        assert done.returncode == {"python": 2, "accelerate": 1}[launcher]
        assert done.stderr.splitlines()[-1] == ours[0] and "Traceback" not in done.stderr
    nothing_left(tmp_path / "run")
