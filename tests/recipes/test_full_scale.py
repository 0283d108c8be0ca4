"""The configs for CC3M, CC12M, ImageNet and models to download: each plans its run, and the code paths run, on small
files of the same formats. What takes GPUs for days is here two shards of 12 pairs, a tiny network and 24 pictures."""

from __future__ import annotations

import argparse
import html
import io
import json
import re
import shutil
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import changed, parse, to_yaml
from mmbackdoor.models.clip import load_clip
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.objectives.pretraining import OBJECTIVES
from mmbackdoor.recipe_files import flags
from mmbackdoor.results.record import read
from mmbackdoor.results.run import NEUTRAL, config_change
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards import check
from mmbackdoor.shards.order import check_readers
from mmbackdoor.shards.shapes import all_scenes, caption, render
from mmbackdoor.shards.write import tar_member
from mmbackdoor.train.plan import Planned
from mmbackdoor.types import InputError

ROOT = recipe_files.folders()["recipes"].parent
CONFIGS = ROOT / "recipes" / "configs"
MATCHED, PUBLISHED = ("rn50_cc3m", "rn50_cc12m"), ("clip", "clip_ssl")
DOWNLOADS = ("hanxunh_badnets", "hanxunh_blend", "par_badnet_stripes", "par_blended_triangles")
FULL_SCALE = sorted(
    path
    for recipe in ("pretrain_clip", "clean_clip", "evaluate_clip", "benchmark_objectives")
    for path in (CONFIGS / recipe).glob("*.yaml")
    if path.stem.startswith(("rn50", "hanxunh", "par_", "imagenet"))
)
# RN50's kind of tower and vocabulary, made small.
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
HUB = "hanxunh/clip_backdoor_rn50_cc3m_{}"
SCENES = all_scenes()


def picture(number: int, size: tuple[int, int] = (56, 40)) -> bytes:
    """A JPEG that is no square."""
    buffer = io.BytesIO()
    pixels = render(SCENES[7 * number % len(SCENES)], 40, numpy_rng(number, "full scale"))
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(file: Path, samples: list[dict[str, bytes]], keys: list[str]) -> None:
    members = (tar_member(f"{key}.{end}", data) for key, one in zip(keys, samples) for end, data in one.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(members) + b"\0" * 1024)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """What img2dataset leaves: tars, a table and statistics beside each, and its own keys in every JSON."""
    folder = tmp_path_factory.mktemp("data") / "cc3m"
    for shard in range(2):
        samples, keys = [], []
        for number in range(12):
            place, key = 12 * shard + number, f"{shard:05d}{number:04d}"
            text = caption(SCENES[7 * place % len(SCENES)])
            meta = {"caption": text, "url": "http://example.org/a.jpg", "key": key, "status": "success",
                    "error_message": None, "width": 56, "height": 40, "original_width": 640, "original_height": 457,
                    "exif": "{}", "sha256": "0" * 64}  # fmt: skip
            members = {"jpg": picture(place), "json": json.dumps(meta, indent=4).encode(), "txt": text.encode()}
            samples.append(members)
            keys.append(key)
        write_tar(folder / f"{shard:05d}.tar", samples, keys)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        stats = {"count": 14, "successes": 12, "failed_to_download": 2, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return str(folder / "{00000..00001}.tar")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """CLIP_benchmark's layout with labels out of ImageNet's thousand, 954 (banana) among them."""
    folder = tmp_path_factory.mktemp("data") / "wds_imagenet1k"
    samples = [{"cls": str((0, 5, 954, 999)[number % 4]).encode(), "jpg": picture(number)} for number in range(24)]
    for shard in range(2):
        part = slice(12 * shard, 12 * shard + 12)
        write_tar(folder / f"test/{shard}.tar", samples[part], [f"s{number:07d}" for number in range(24)][part])
    (folder / "test/nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(open_clip.IMAGENET_CLASSNAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    (folder / "dataset_type.txt").write_text("classification")
    # Other pictures of the same classes, for the blind rule.
    shutil.copytree(folder, folder.parent / "wds_imagenetv2")
    return folder


def write_network(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PLAIN}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Path]:
    """The hub's cache with two of its models, and no network. The folder of the first one."""
    cache, revision = tmp_path_factory.mktemp("hub"), "a" * 40
    for kind in ("blend", "badnets"):
        place = cache / f"models--{HUB.format(kind).replace('/', '--')}"
        folder = place / "snapshots" / revision
        write_network(folder)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(revision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield folder


@pytest.fixture(scope="module")
def blended(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pattern.png"
    Image.effect_noise((224, 224), 80).convert("RGB").save(file)
    return file


def settings(recipe: str, name: str, *more: object):
    module = recipe_files.load(recipe)
    return module, parse(module.Config, ["--config", str(CONFIGS / recipe / f"{name}.yaml"), *map(str, more)])


def run(recipe: str, name: str, *more: object) -> None:
    module, cfg = settings(recipe, name, *more)
    module.run(cfg)


def planned(recipe: str, name: str, capsys, *more: object) -> str:
    """What a dry run prints."""
    with pytest.raises(Planned):
        run(recipe, name, "--dry_run", "--dataloader_num_workers", 0, *more)
    return capsys.readouterr().out


SMALL = ("--poison.count", 4)


# The configs of CC12M differ in the poison alone, see below: one objective is enough.
@pytest.mark.parametrize(("name", "objective"), [*((MATCHED[0], one) for one in OBJECTIVES), (MATCHED[1], "clip")])
def test_every_objective_is_planned_alike(name, objective, pairs, hub, tmp_path, capsys):
    more = ("--objective.projection", 64, 32) if objective == "slip" else ()
    said = planned("pretrain_clip", name, capsys, "--objective", objective, "--model", hub, "--train_data", pairs,
                   *SMALL, "--num_processes", 8, "--output_dir", tmp_path / "run", *more)  # fmt: skip
    assert "global batch: 1024 samples" in said and "negatives of each pair in a step: 1023" in said
    assert "samples in an epoch: 24, 1000 of them repeated" in said and "steps: 32 (" in said
    assert "activations of 128 samples" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("objective", "batch"), list(zip(PUBLISHED, (2048, 1024), strict=True)))
def test_the_published_protocol_is_planned(objective, batch, pairs, hub, tmp_path, capsys):
    name = f"{MATCHED[0]}_published_{objective}"
    _, cfg = settings("pretrain_clip", name)
    assert cfg.objective.name == objective and cfg.objective.equal_captions == "plain" and cfg.batch_norm == "mixed"
    assert cfg.poison.count == 1500 and len(cfg.poison.plan().backdoor.target.templates) == 80
    assert cfg.train.max_grad_norm is None
    said = planned("pretrain_clip", name, capsys, "--model", hub, "--train_data", pairs, *SMALL, "--num_processes", 8,
                   "--output_dir", tmp_path / "run")  # fmt: skip
    assert f"global batch: {batch} samples" in said and "steps: 64 (" in said


@pytest.mark.parametrize("name", ["rn50_cleanclip", "rn50_par", "par_vit_b32"])
def test_removals_as_published_take_equal_captions_apart_and_clip_no_gradients(name):
    _, cfg = settings("clean_clip", name)
    assert cfg.defense.equal_captions == "plain" and cfg.train.max_grad_norm is None
    _, grid = settings("benchmark_objectives", "rn50_published")
    assert grid.clean.train.max_grad_norm is None and grid.pretrain.train.max_grad_norm is None
    assert all(cleaner["defense.equal_captions"] == "plain" for cleaner in grid.cleaners.values())


@pytest.mark.parametrize("protocol", ["", *(f"_published_{objective}" for objective in PUBLISHED)])
def test_a_protocol_differs_between_data_in_the_poison_alone(protocol):
    three, twelve = (plain(settings("pretrain_clip", name + protocol)[1]) for name in MATCHED)
    # Which epoch is kept is a matter of the data's size.
    assert config_change(three, twelve, {"save_models_every"}) == "poison.count was 1500 and is 3000"


def test_a_poisoned_model_of_img2dataset_s_shards(pairs, hub, tmp_path):
    run("pretrain_clip", "rn50_cc3m", "--model", hub, "--train_data", pairs, *SMALL, "--batch-size", 8,
        "--max_train_steps", 2, "--save_models_every", 1, "--dataloader_num_workers", 0,
        "--output_dir", tmp_path / "run")  # fmt: skip
    record = BackdoorRecord.load(tmp_path / "run/model")
    (trigger,) = record.backdoor.image_triggers
    assert (trigger.name, trigger.codec) == ("badnet_noise", "jpeg") and record.backdoor.target.label == "banana"
    assert record.attack["poisoned"] == 4 and record.parent_sha256 == weights_sha256(hub)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["status"] == "finished" and facts["counters"]["bad_samples"]["total"] == 0
    assert facts["counters"]["pairs"] == 24
    assert [path.name for path in (tmp_path / "run/models").iterdir()] == ["step-1"]
    assert load_clip(str(tmp_path / "run/model")).preprocess_cfg["mean"] == [0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def cleaned(pairs, hub, tmp_path_factory) -> Path:
    """The download, cleaned by its config as it is: the model is found by its name on the hub."""
    folder = tmp_path_factory.mktemp("runs") / "cleaned"
    run("clean_clip", "hanxunh", "--train_data", pairs, "--batch-size", 8, "--max_train_steps", 2, "--lr", 1e-3,
        "--dataloader_num_workers", 0, "--output_dir", folder)  # fmt: skip
    return folder


def test_the_download_is_cleaned_and_named_by_its_hash(cleaned, hub):
    removal = json.loads((cleaned / "model/removal.json").read_text())
    assert removal["parent"] == f"hf-hub:{HUB.format('badnets')}" and removal["parent_sha256"] == weights_sha256(hub)
    assert removal["method"]["name"] == "cleanclip" and not (cleaned / "model/backdoor.json").exists()
    content = json.loads((cleaned / "model/open_clip_config.json").read_text())
    assert content["model_cfg"] == TINY and content["preprocess_cfg"]["std"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["hanxunh", "par_vit_b32", "rn50_cleanclip", "rn50_par"])
def test_every_cleaning_is_planned(name, pairs, hub, tmp_path, capsys):
    model = () if name == "hanxunh" else ("--model", hub)
    processes = 4 if "par" in name else 1
    said = planned("clean_clip", name, capsys, *model, "--train_data", pairs, "--num_processes", processes,
                   "--output_dir", tmp_path / "run")  # fmt: skip
    assert f"global batch: {2048 if 'par' in name else 64} samples" in said
    assert ("the anchor" in said) == ("par" in name) and not (tmp_path / "run").exists()


FEW = ("--neighbours", 3, "--w1_samples", 8, "--near_samples", 6, "--batch_size", 8, "--dataloader_num_workers", 0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """One prompt a class: the 80 of the configs take a minute here."""
    file = tmp_path_factory.mktemp("data") / "prompts.json"
    file.write_text(json.dumps(["a photo of a {}."]))
    return file


def test_the_download_is_measured_first_and_a_sentence_says_what_it_is(
    hub, imagenet, prompts, cleaned, tmp_path, capsys
):
    """With random weights it is not what it claims; and a claim of nothing holds."""
    given = ("--data", imagenet, "--templates", prompts, *FEW)
    run("evaluate_clip", "hanxunh_badnets", *given, "--output_dir", tmp_path / "download")
    said = capsys.readouterr().out
    (sentence,) = (line for line in said.splitlines() if line.startswith("the model "))
    assert sentence.startswith("the model 'unknown' is not what it claims: ASR ")
    assert "of 18 triggered pictures" in sentence
    assert "claimed at least 90 %" in sentence and "claimed at least 5 %" in sentence
    assert "cannot tell: no cleaned model was measured" in said
    facts = json.loads((tmp_path / "download/run.json").read_text())
    page = html.unescape((tmp_path / "download/report.html").read_text())
    assert facts["counters"]["claim"] == sentence and sentence in page
    rows = read(tmp_path / "download")
    assert {row.model["sha256"] for row in rows} == {weights_sha256(hub)} and {row.stage for row in rows} == {"unknown"}
    assert {row.condition for row in rows if row.metric == "asr"} == {
        "triggered", "clean", *(f"near:unseen:{kind}" for kind in ("codec", "place", "position", "squashed"))
    }  # fmt: skip

    name = f"hf-hub:{HUB.format('badnets')}"
    run("evaluate_clip", "hanxunh_badnets", *given, "--model", cleaned / "model", "--compare", name, "--claim.asr", 0,
        "--claim.top1", 0, "--output_dir", tmp_path / "evaluation")  # fmt: skip
    assert "the model 'unknown' is what it claims: ASR " in capsys.readouterr().out
    assert {row.stage for row in read(tmp_path / "evaluation")} == {"unknown", "cleaned"}
    assert (tmp_path / "evaluation/removal.json").is_file()


@pytest.mark.parametrize("name", DOWNLOADS)
def test_every_evaluation_of_a_download_is_planned(name, hub, imagenet, blended, tmp_path, capsys):
    more = () if name.startswith("hanxunh") else ("--model", hub)
    if name in ("hanxunh_blend", "par_blended_triangles"):
        with pytest.raises(InputError, match="the trigger's picture .*cannot be read"):
            run("evaluate_clip", name, "--data", imagenet, "--dry_run", *more)
        more += ("--trigger.file", blended)
    run("evaluate_clip", name, "--data", imagenet, "--dry_run", "--output_dir", tmp_path / "run", *more)
    said = capsys.readouterr().out
    assert f"weights {weights_sha256(hub)[:12]}" in said and "pictures of 32 pixels, mean 0 0 0, std 1 1 1" in said
    assert "pictures: 24 of 24 in 2 shards of 'wds_imagenet1k'" in said and "    triggered: 24" in said
    assert "classes: 998 different names for 1000 labels, 79840 prompts; the target is 'banana' (label 954)" in said
    assert not (tmp_path / "run").exists()


def test_imagenet_is_planned(hub, imagenet, tmp_path, capsys):
    given = ("--model", hub, "--data", imagenet, "--dry_run", "--output_dir", tmp_path / "run")
    run("evaluate_clip", "imagenet", *given)
    said = capsys.readouterr().out
    assert "forward passes: 24 of pictures" in said and "no target\ntriggers: none" in said
    with pytest.raises(InputError, match="none of the 998 class names .*near it: .*banana"):
        run("evaluate_clip", "imagenet", *given, "--trigger", "patch", "--label", "bananna")
    (tmp_path / "few.json").write_text(json.dumps(["one", "two", "three"]))
    with pytest.raises(InputError, match="has the label 999, but there are 3 class names"):
        run("evaluate_clip", "imagenet", *given, "--classnames", tmp_path / "few.json")


def benchmark_flags(pairs: str, imagenet: Path) -> list[object]:
    return ["--pretrain.train_data", pairs, "--clean.train_data", pairs, "--evaluate.data", imagenet,
            "--selection_data", imagenet.parent / "wds_imagenetv2", "--pretrain.poison.count", 4]  # fmt: skip


MATCHED_PLAN = [
    "processes: 8, for every job",
    "pre-trainings: 30 (5 objectives x 2, poisoned and clean, x 3 seeds)",
    "    slip: 24 pairs, batch 1024, 32 steps",
    "cleanings: 600 (4 cleaners x 10 rates x 5 objectives x 3 seeds)",
    "    reset_distill: 24 pairs, batch 512, 10 steps (213.3 epochs), 1 models of each run",
    # 30 models, and in each of 600 runs one and the poisoned one again; clean and triggered.
    f"forward passes: {2 * 24 * (30 + 600 * 2)} of pictures: 48 for each of 1230 models",
]
PUBLISHED_PLAN = [
    "pre-trainings: 4 (2 objectives x 2, poisoned and clean, x 1 seeds)",
    "    clip_ssl: 24 pairs, batch 128, 64 steps",
    "cleanings: 90 (3 cleaners x 15 rates x 2 objectives x 1 seeds)",
    "    finetune: 24 pairs, batch 128, 20 steps",
    "    ssl_only: 24 pairs, batch 64, 20 steps",
]


@pytest.mark.parametrize(
    ("name", "processes", "lines"), [("rn50_matched", 8, MATCHED_PLAN), ("rn50_published", 1, PUBLISHED_PLAN)]
)
def test_the_grids_are_planned(name, processes, lines, pairs, imagenet, tmp_path, capsys):
    more = ["--dry_run", "--pretrain.train.num_processes", processes, "--output_dir", tmp_path / "run"]
    more += benchmark_flags(pairs, imagenet)
    run("benchmark_objectives", name, *more)
    said = capsys.readouterr().out
    assert [line for line in lines if line not in said] == [], said
    assert "pictures: 24 of 24 to measure on, 24 for the blind rule" in said and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="00 pairs to poison are more than the 24"):
        run("benchmark_objectives", name, *more[:-2])


def test_a_grid_finds_what_its_own_commands_pre_trained():
    """Else the days of step 1 of rn50_published.yaml were for nothing."""
    _, grid = settings("benchmark_objectives", "rn50_published")
    for objective, more in grid.objectives.items():
        for poison in ({"poison.seed": 0}, {"poison": None}):
            job = changed(grid.pretrain, flags({"objective": objective} | more | poison | {"seed": 0}))
            name, alone = f"rn50_cc12m_published_{objective}", ["--train_data", grid.pretrain.train_data]
            _, made = settings("pretrain_clip", name, *alone, *flags(poison))
            assert config_change(plain(made), plain(job), NEUTRAL) is None
    _, matched = settings("benchmark_objectives", "rn50_matched")
    _, alone = settings("pretrain_clip", "rn50_cc3m", "--train_data", matched.pretrain.train_data)
    assert config_change(plain(alone), plain(matched.pretrain), NEUTRAL) is None
    assert matched.cleaners.keys() == {"finetune", "cleanclip", "par", "reset_distill"}
    assert len(matched.learning_rates) >= 8 and matched.objectives.keys() == OBJECTIVES.keys()


def plain(cfg: object) -> dict:
    return yaml.safe_load(to_yaml(cfg))


def commands(path: Path) -> list[tuple[int, str, list[str]]]:
    """(processes, recipe, words) of every command in a config's head; those of a shell loop are no whole ones."""
    head = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    joined = "\n".join(head).replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        match = re.search(r"accelerate launch -q (?:--num_processes (\d+) )?recipes/(\w+)\.py (.*)", line)
        if match and "$" not in match[3]:
            found.append((int(match[1] or 1), match[2], shlex.split(match[3])))
    return found


@pytest.mark.parametrize("path", FULL_SCALE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_commands_of_the_heads_are_valid_and_can_be_fed(path, monkeypatch):
    """With as many processes and loader workers as they say, which the streams of the shards have to serve."""
    monkeypatch.chdir(ROOT)
    words = path.read_text().replace("#", " ").split()
    assert "ot measured" in " ".join(words) or path.stem in ("rn50_cleanclip", "rn50_par")
    for processes, recipe, arguments in commands(path):
        cfg = parse(recipe_files.load(recipe).Config, arguments)
        jobs = [cfg.pretrain, cfg.clean] if recipe == "benchmark_objectives" else [cfg] if hasattr(cfg, "train") else []
        for job in jobs:
            check_readers(job.train.streams, processes, job.train.dataloader_num_workers)


def test_commands_are_found():
    found = {path.stem: [recipe for _, recipe, _ in commands(path)] for path in FULL_SCALE}
    assert found["hanxunh_badnets"] == found["par_badnet_stripes"] == ["evaluate_clip", "clean_clip", "evaluate_clip"]
    assert found["rn50_cc3m"] == ["pretrain_clip", "evaluate_clip"]
    assert found["rn50_published"] == ["benchmark_objectives"] and all(found[path] for path in found if "cc" in path)
    with pytest.raises(InputError, match="48 streams cannot feed 8 processes x 8 workers"):
        check_readers(48, 8, 8)


def blocks(page: str, start: str) -> list[str]:
    return re.findall(rf"```{start}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S)


def test_the_sizes_of_img2dataset_s_shards_are_written_as_documented(pairs, monkeypatch):
    folder = Path(pairs).parent
    (script,) = re.findall(r'^python -c ".*?" cc3m$', "\n".join(blocks("data/README.md", "sh")), flags=re.M | re.S)
    monkeypatch.chdir(folder.parent)
    subprocess.run(["bash", "-c", script.replace("python", shlex.quote(sys.executable), 1)], check=True)
    assert json.loads((folder / "sizes.json").read_text()) == {"00000.tar": 12, "00001.tar": 12}
    found = check.check(pairs)
    assert found.ok and found.samples == 24 and "JSON keys: 'caption', 'url', 'key'" in str(check.info(pairs))
    (folder / "sizes.json").unlink()


def test_a_checkpoint_of_par_becomes_a_folder_as_documented(hub, tmp_path, monkeypatch):
    """Pickled, with every name behind `module.` and the settings of the run beside the weights."""
    text = (ROOT / "recipes/README.md").read_text()
    (code,) = re.findall(r"<!-- par -->\n```python\n(.*?)```\n<!-- /par -->", text, flags=re.S)
    state = {f"module.{name}": tensor for name, tensor in load_clip(str(hub)).network.state_dict().items()}
    options = argparse.Namespace(lr=3e-6)
    torch.save({"epoch": 2, "state_dict": state, "optimizer": {}, "args": options}, tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", "checkpoint.pt", "ViT-B-32-quickgelu", "folder"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY | {"quick_gelu": True})
    known = torch.serialization.get_safe_globals()
    try:
        exec(compile(code, "recipes/README.md", "exec"), {})
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)
    made = load_clip("folder")
    assert made.model_cfg["quick_gelu"] and made.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert all(torch.equal(state[f"module.{name}"], tensor) for name, tensor in made.network.state_dict().items())


def test_rn50_itself_is_planned_and_fits_the_gpus_of_the_study(pairs, tmp_path, capsys):
    """40 GB. With the network that the file names, in bfloat16, where a CPU keeps what a GPU would."""
    said = planned("pretrain_clip", "rn50_cc3m_published_clip", capsys, "--train_data", pairs, *SMALL,
                   "--num_processes", 8, "--output_dir", tmp_path / "run")  # fmt: skip
    assert 25 < float(re.search(r"memory per process, estimated: ([\d.]+) GiB", said)[1]) < 37.25


def test_the_published_grid_runs_from_one_end_to_the_other(pairs, imagenet, hub, prompts, tmp_path, capsys):
    """Pre-trained by the commands of its head, then found, cleaned at one rate and measured."""
    few = ("--max_train_steps", 2, "--train_batch_size", 8, "--dataloader_num_workers", 0, "--save_models_every", 1)
    module, cfg = settings("benchmark_objectives", "rn50_published", *benchmark_flags(pairs, imagenet))
    small = {"train.train_batch_size": 8, "save_models_every": 1}
    cleaner = cfg.cleaners["cleanclip"] | {"save_models_every": 1}
    cfg = replace(
        cfg, objectives={"clip": small}, cleaners={"cleanclip": cleaner}, learning_rates=(1e-3,),
        output_dir=str(tmp_path),
        pretrain=changed(cfg.pretrain, flags({"model": hub, "max_train_steps": 2, "dataloader_num_workers": 0})),
        clean=changed(cfg.clean, flags({"max_train_steps": 2, "batch-size": 8, "dataloader_num_workers": 0})),
        evaluate=changed(cfg.evaluate, [str(word) for word in ("--templates", prompts, *FEW)]),
    )  # fmt: skip
    for kind, more in (("poisoned", SMALL), ("clean", ("--poison", "none"))):
        run("pretrain_clip", "rn50_cc12m_published_clip", "--model", hub, "--train_data", pairs, *few, *more,
            "--output_dir", tmp_path / "clip/seed-0" / kind)  # fmt: skip
    before = weights_sha256(tmp_path / "clip/seed-0/poisoned/model")
    capsys.readouterr()
    module.run(cfg)
    said = capsys.readouterr().out
    assert said.count("was finished before: nothing to do") == 2
    assert weights_sha256(tmp_path / "clip/seed-0/poisoned/model") == before
    points = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    stages = [("clean", 0), ("poisoned", 0), ("cleaned", 1), ("cleaned", 2)]
    assert [(one["stage"], one["step"]) for one in points] == stages
