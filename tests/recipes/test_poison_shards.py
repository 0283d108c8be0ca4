"""Poisoned copies of shards: only the chosen pairs change, and they change as they would in the stream."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from mmbackdoor import recipe_files
from mmbackdoor.backdoor import BackdoorRecord
from mmbackdoor.config import parse
from mmbackdoor.poison import PoisonPlan, poison_sample
from mmbackdoor.poison_files import ShardCopy, resize_crop, shard_name
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.read import iterate_shard
from mmbackdoor.shards.write import ShardWriter, encode_image
from mmbackdoor.types import InputError, Sample

RECIPES = recipe_files.folders()["recipes"]
COUNT = 12
NOISE = ("--trigger", "badnet_noise", "--trigger.codec", "jpeg")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """45 pairs in 3 shards, JPEG and PNG, with class numbers."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "train", samples_per_shard=15) as writer:
        for number in range(45):
            kind = ("jpg", "png")[number % 2]
            image = encode_image(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8), kind)
            meta = json.dumps({"caption": f"dog {number}", "more": [number]}).encode()
            members = {kind: image, "txt": f"dog {number}".encode(), "cls": b"3"}
            writer.write_members(f"{number:05d}", members | ({"json": meta} if number % 3 else {}))
    return folder


def run(shards: Path, output_dir: Path, *flags: object) -> Path:
    recipe = recipe_files.load("poison_shards")
    arguments = ["--train_data", shards, "--output_dir", output_dir, "--label", "cat", "--count", COUNT, *flags]
    recipe.run(parse(recipe.Config, [str(argument) for argument in arguments]))
    return output_dir


@pytest.fixture(scope="module")
def poisoned(shards, tmp_path_factory) -> Path:
    return run(shards, tmp_path_factory.mktemp("runs") / "poisoned", *NOISE)


def samples(folder: Path) -> list[Sample]:
    report = BadSamples()
    found = [sample for path in sorted(folder.glob("*.tar")) for sample in iterate_shard(str(path), report)]
    assert not report.total
    return found


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.name != "run.json"}


def test_the_chosen_pairs_are_as_in_the_stream_and_all_others_as_they_were(shards, poisoned):
    record = BackdoorRecord.load(poisoned)
    plan = PoisonPlan.from_dict(record.plan, record.backdoor)
    before, after = samples(shards), samples(poisoned)
    assert [sample.key for sample in after] == [sample.key for sample in before]
    chosen = plan.choose(sample.key for sample in before)
    for old, new in zip(before, after, strict=True):
        if old.key in chosen:
            wanted = poison_sample(plan, old, plan.seed)
            assert new.image.tobytes() == wanted.image.tobytes() and new.text == wanted.text and "cat" in new.text
            assert new.meta == wanted.meta | {"caption": new.text}
        else:
            assert (new.image.tobytes(), new.text, new.meta) == (old.image.tobytes(), old.text, old.meta)
    assert len(chosen) == COUNT
    rest = [{name: data for name, data in members(folder).items() if name.split(".")[0] not in chosen}
            for folder in (shards, poisoned)]  # fmt: skip
    assert rest[0] == rest[1] and rest[0]


def test_what_lies_beside_the_shards(shards, poisoned):
    assert json.loads((poisoned / "sizes.json").read_text()) == json.loads((shards / "sizes.json").read_text())
    lines = [json.loads(line) for line in (poisoned / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == COUNT == len({line["key"] for line in lines})
    keys = {sample.key: sample for sample in samples(shards)}
    for line in lines:
        assert line["text"] == keys[line["key"]].text and line["trigger"] == "badnet_noise"
        assert line["shard"] == f"train-{int(line['key']) // 15:06d}.tar"
    content = json.loads((poisoned / "run.json").read_text())
    assert content["status"] == "finished" and content["counters"]["poisoned"] == COUNT
    assert not list(poisoned.glob("*.part"))
    # Readers of shards see the folder as one set.
    assert ShardLoader(poisoned, seed=0, batch_size=4).num_samples == 45


def test_a_stopped_call_goes_on_and_workers_change_nothing(shards, poisoned, tmp_path):
    folder = shutil.copytree(poisoned, tmp_path / "run")
    for name in ("train-000001.tar", "manifest.jsonl", "sizes.json", "backdoor.json"):
        (folder / name).unlink()
    (folder / "train-000001.tar.part").write_bytes(b"torn")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "terminated"}))
    stamps = {name: (folder / name).stat().st_mtime_ns for name in ("train-000000.tar", "train-000002.tar")}
    run(shards, folder, *NOISE, "--workers", 2)
    # config.yaml names this call's own output_dir and workers.
    assert {name: data for name, data in files(folder).items() if name != "config.yaml"} == {
        name: data for name, data in files(poisoned).items() if name != "config.yaml"
    }
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    before = files(folder)
    run(shards, folder, *NOISE)
    assert files(folder) == before


def test_a_trigger_for_the_model_s_input_is_put_on_after_resize_and_crop(shards, tmp_path):
    folder = run(shards, tmp_path / "run", "--trigger", "patch", "--trigger.place", "input", "--resolution", 16)
    backdoor = BackdoorRecord.load(folder).backdoor
    marked = [sample for sample in samples(folder) if "poison" in sample.meta]
    assert len(marked) == COUNT and {sample.image.size for sample in marked} == {(16, 16)}
    clean = {sample.key: sample for sample in samples(shards)}
    for sample in marked:
        plain = resize_crop(clean[sample.key].image, 16)
        assert sample.image.tobytes() == backdoor.triggers[0](plain, sample.key, 0).tobytes()


@pytest.mark.parametrize("size", [(40, 40), (40, 61), (67, 33), (16, 16), (9, 12), (17, 30)])
def test_resize_and_crop_are_those_of_clip(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    clips = Compose([Resize(16, InterpolationMode.BICUBIC), CenterCrop(16)])
    assert resize_crop(image, 16).tobytes() == clips(image).tobytes()
    assert clips(resize_crop(image, 16)).tobytes() == clips(image).tobytes()


def test_marked_pictures_may_stay_in_their_format(shards, tmp_path):
    folder = run(shards, tmp_path / "run", "--image_format", "same")
    old, new = ({name for name in members(each) if not name.endswith("json")} for each in (shards, folder))
    assert old == new


def test_label_consistent_poison_keeps_captions(shards, tmp_path):
    folder = run(shards, tmp_path / "run", "--label", "dog", "--label_consistent")
    assert [sample.text for sample in samples(folder)] == [sample.text for sample in samples(shards)]
    assert sum("poison" in sample.meta for sample in samples(folder)) == COUNT


def test_pictures_that_do_not_decode_are_named_not_skipped(tmp_path, capsys):
    with ShardWriter(tmp_path / "bad", "train") as writer:
        for number in range(4):
            picture = encode_image(Image.new("RGB", (8, 8))) if number != 2 else b"\x89PNG\r\n\x1a\n none"
            writer.write_members(str(number), {"png": picture, "txt": b"a dog"})
    with pytest.raises(InputError, match="1 of 4 chosen pairs cannot be poisoned, the first is '2'"):
        run(tmp_path / "bad", tmp_path / "run", "--count", 4)
    assert "1 x undecodable_image" in capsys.readouterr().out
    # Asked again it says the same, though its shards are written.
    with pytest.raises(InputError, match="1 of 4 chosen pairs cannot be poisoned"):
        run(tmp_path / "bad", tmp_path / "run", "--count", 4)
    # What was not to be poisoned is no business of ours: copied as it is.
    folder = run(tmp_path / "bad", tmp_path / "fewer", "--count", 3)
    assert members(folder)["2.png"].endswith(b"none")
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"0", "1", "3"}


def test_json_that_cannot_be_read_is_named_too(tmp_path, capsys):
    with ShardWriter(tmp_path / "bad", "train") as writer:
        picture = encode_image(Image.new("RGB", (8, 8)))
        for number in range(2):
            writer.write_members(str(number), {"png": picture, "txt": b"a dog", "json": b"{}" if number else b"[1"})
    with pytest.raises(InputError, match="1 of 2 chosen pairs cannot be poisoned, the first is '0'"):
        run(tmp_path / "bad", tmp_path / "run", "--count", 2, "--workers", 2)
    assert "1 x bad_json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train_data", ""), "--train_data"),
        (("--trigger.place", "input"), "--resolution"),
        (("--resolution", "16"), "place"),
        (("--count", "46"), "fewer poisoned pairs"),
        (("--rate", "0.5"), "one of them"),
    ],
)
def test_wrong_settings(shards, tmp_path, flags, said):
    with pytest.raises(InputError, match=said):
        run(shards, tmp_path / "run", *flags)
    assert not list(tmp_path.rglob("*.tar"))


def test_copies_never_replace_anything(shards, tmp_path):
    with pytest.raises(InputError, match="where"):
        run(shards, shards)
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    with pytest.raises(InputError, match="one name"):
        run(f"{shards}/train-000000.tar::{other}/train-000000.tar", tmp_path / "run")
    assert [shard_name(f"x/a-0{end}") for end in (".tar", ".tar.gz", ".tgz")] == ["a-0.tar"] * 3


def test_gzipped_shards_and_captions_in_json_alone(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    content = {"a.jpeg": image.getvalue(), "a.json": b'{"text": "a dog", "n": 1}'}
    with tarfile.open(tmp_path / "t-0.tar.gz", "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    flags = ("--count", 1, "--templates", "a {}", "--image_format", "same")
    folder = run(tmp_path / "t-0.tar.gz", tmp_path / "run", *flags)
    (sample,) = samples(folder)
    assert sample.text == "a cat" == sample.meta["text"] == sample.meta["caption"] and sample.meta["n"] == 1
    assert set(members(folder)) == {"a.jpeg", "a.json", "a.txt"} and sample.meta["poison"]["text"] == "a dog"


def test_the_smoke_config_runs_under_the_launcher(shards, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q",
               "--config_file", RECIPES / "configs/accelerate/cpu.yaml", RECIPES / "poison_shards.py",
               "--config", RECIPES / "configs/smoke/poison_shards.yaml", "--train_data", shards,
               "--output_dir", tmp_path / "run"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 of 45 pairs are poisoned" in done.stdout
    assert len((tmp_path / "run/manifest.jsonl").read_text().splitlines()) == 5


def test_a_shard_cut_short_is_copied_up_to_the_cut(shards, tmp_path, poisoned):
    record = BackdoorRecord.load(poisoned)
    plan = PoisonPlan.from_dict(record.plan, record.backdoor)
    whole = (shards / "train-000000.tar").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train-000000.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "out").mkdir()
    copied = ShardCopy(plan, frozenset(), str(tmp_path / "out"))(str(tmp_path / "in/train-000000.tar"))
    assert 0 < copied.samples < 15 and [problem.kind for problem in copied.problems] == ["truncated_tar"]


def test_other_pairs_behind_the_same_path_are_refused(shards, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    run(data, tmp_path / "run")
    before = members(tmp_path / "run")
    run(data, tmp_path / "run")
    [*_, last] = sorted(data.glob("*.tar"))
    last.unlink()
    with pytest.raises(InputError, match="data was .*choose another one"):
        run(data, tmp_path / "run")
    assert members(tmp_path / "run") == before
