import io
import json
import re
import tarfile

import pytest
from PIL import Image

from mmbackdoor.evaluate.metrics.pairs import parse_caption as parse_pair_caption
from mmbackdoor.evaluate.metrics.shapes import parse_caption
from mmbackdoor.evaluate.prompts import (
    BUILT_IN,
    GENERAL,
    load_prompts,
    make_suite,
    overlong,
    pair_prompts,
    shape_prompts,
)
from mmbackdoor.shards.pairs import PairScene, split_key, split_of
from mmbackdoor.shards.shapes import Scene
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError


def test_built_in_sets_are_disjoint():
    general = {name: set(load_prompts(name).texts) for name in GENERAL}
    assert {name: len(texts) for name, texts in general.items()} == {
        "general-train": 60,
        "general-selection": 20,
        "general-evaluation": 214,
    }
    assert not general["general-train"] & general["general-evaluation"] and len(load_prompts("general")) == 294
    shapes = [
        {Scene(**p.meta["scene"]) for p in load_prompts(f"shapes-{s}")} for s in ("train", "selection", "evaluation")
    ]
    assert all(shapes) and not shapes[0] & shapes[1] and not shapes[0] & shapes[2] and not shapes[1] & shapes[2]


def test_no_evaluation_prompt_is_a_near_copy_of_a_training_prompt():
    def words(text):
        return set(re.findall(r"[a-z]+", text.lower())) - {"a", "an", "the", "on", "in", "of", "with", "and", "photo"}

    train = [words(text) for text in load_prompts("general-train").texts]
    for text in load_prompts("general-evaluation").texts:
        mine = words(text)
        assert max(len(mine & other) / len(mine | other) for other in train) <= 0.5, text


def test_every_general_split_has_common_objects():
    for name in GENERAL:
        texts = load_prompts(name).texts
        assert all(sum(f" {thing}" in text for text in texts) >= 1 for thing in ("dog", "cat", "car", "bicycle"))


def test_captions_of_shards(tmp_path):
    """Each once, in their order; no picture is looked at."""
    with ShardWriter(tmp_path, "test", 2) as shards:
        for number, text in enumerate(("a cat", "a dog", "a cat", "a red bird")):
            shards.write(f"s{number}", Image.new("RGB", (2, 2)), text, {})
    file = tmp_path / "test-000001.tar"
    file.write_bytes(file.read_bytes().replace(b"\x89PNG", b"none"))
    suite = load_prompts(f"{tmp_path}/test-{{000000..000001}}.tar")
    assert suite.texts == ["a cat", "a dog", "a red bird"] and "1 repeated prompts" in suite.notices[0]
    with pytest.raises(InputError, match="no-such"):
        load_prompts(f"{tmp_path}/no-such.tar.gz")


def test_a_caption_of_half_a_character_is_no_prompt(tmp_path):
    with tarfile.open(tmp_path / "test-000000.tar", "w") as shard:
        for key, text in (("a", "a cat \\ud83d"), ("b", "a dog \\ud83d\\ude00")):
            for name, content in ((f"{key}.png", b"not looked at"), (f"{key}.json", f'{{"caption": "{text}"}}'.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    assert load_prompts(f"{tmp_path}/test-000000.tar").texts == ["a dog \U0001f600"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("p.txt", "a cat\n\n# not a comment\r\na cat\n  a dog \n", ["a cat", "# not a comment", "a dog"]),
        ("p.csv", 'id,Prompt\n1,"a cat, asleep"\n2,a dog\n', ["a cat, asleep", "a dog"]),
        ("p.csv", "\ufefftext\na cat\n", ["a cat"]),
        ("p.tsv", 'Prompt\tCategory\na "big" cat\tAnimals\n', ['a "big" cat']),
        ("p.jsonl", '{"caption": "a cat", "n": 1}\n\n"a dog"\n', ["a cat", "a dog"]),
    ],
)
def test_files(tmp_path, name, content, texts):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    suite = load_prompts(path)
    assert suite.texts == texts and suite.name == "p"
    assert bool(suite.notices) == (content.count("a cat\n") > 1)


def test_other_columns_are_kept(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("Prompt\tCategory\na cat\tAnimals\n")
    assert load_prompts(path).prompts[0].meta == {"Category": "Animals"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "has no prompts"),
        ("p.csv", "words\na cat\n", "no column prompt, text or caption; it has words"),
        ("p.jsonl", '{"prompt": "x"}\n{oops\n', "line 2 is not JSON"),
        ("p.jsonl", "[1]\n", "line 1 is neither"),
        ("p.jsonl", '{"prompt": 3}\n', "row 1: prompt is 3"),
        ("p.jsonl", '{"prompt": "a dog \\ud83d\\ude00"}\n\n{"prompt": "a cat \\ud83d"}\n', r"line 3 .*a cat \\+ud83d.*whole"),
        ("p.jsonl", '"a cat \\udc00"\n', "line 1 holds half a character"),
        ("p.jsonl", '{"prompt": "a cat", "note": "\\ud83d"}\n', "line 1 holds half a character"),
        ("p.docx", "a cat", "neither a .txt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere.txt", "genral"])
def test_unknown_source_names_the_built_in_sets(source):
    with pytest.raises(InputError) as caught:
        load_prompts(source)
    assert source in str(caught.value) and all(name in str(caught.value) for name in BUILT_IN)


def test_ids_follow_the_text_not_the_place():
    first, second = make_suite("a", ["a cat", "a dog"]), make_suite("b", ["a bird", "a dog", "a cat"])
    assert {p.text: p.id for p in first}.items() <= {p.text: p.id for p in second}.items()
    ids = [p.id for p in make_suite("c", ["日本 / ../x", "日本 / ../y", "e" * 400])]
    assert len(set(ids)) == 3 and all(re.fullmatch(r"[a-z0-9-]{1,60}", one) for one in ids)


def test_suite_hash_is_of_the_texts():
    assert make_suite("a", ["x", "y"]).sha256 == make_suite("b", ["y", "x"]).sha256 != make_suite("a", ["x"]).sha256


def test_take_is_stable():
    suite = load_prompts("general")
    assert suite.take(20).texts == suite.take(20).texts and len(suite.take(20)) == 20
    assert set(suite.take(20).texts) <= set(suite.take(40).texts) and suite.take(None) is suite


def test_overlong_prompts_are_named():
    suite = make_suite("s", ["short", "long " * 40])
    (warning,) = overlong(suite, lambda texts: [len(text.split()) + 2 for text in texts], limit=20)
    assert "1 of 2" in warning and not overlong(suite, lambda texts: [3] * len(texts))


def test_shape_prompts_use_every_combination_first():
    suite = shape_prompts("evaluation", 600)
    once = shape_prompts("evaluation")
    scenes = [json.dumps(p.meta["scene"]) for p in suite]
    assert len(suite) == 600 == len(set(suite.texts)) and suite.texts[: len(once)] == once.texts
    assert len(set(scenes[: len(once)])) == len(once) == len(set(scenes)) >= 150
    assert all(parse_caption(p.text) == Scene(**p.meta["scene"]) for p in suite)
    assert shape_prompts("evaluation", 40).texts != shape_prompts("evaluation", 40, seed=1).texts


def test_shape_prompts_where_and_limits():
    crosses = shape_prompts("evaluation", 60, where=lambda scene: scene.shape == "cross")
    assert all(" cross " in text for text in crosses.texts)
    with pytest.raises(InputError, match="ask for fewer"):
        shape_prompts("evaluation", 10**6)
    with pytest.raises(InputError, match="'test' is no split"):
        shape_prompts("test")


def test_pair_prompts_are_of_their_split_and_spread_out():
    for split in ("train", "selection", "evaluation"):
        suite = load_prompts(f"pairs-{split}")
        scenes = [PairScene.from_dict(prompt.meta["scene"]) for prompt in suite]
        assert len(suite) == 400 == len(set(suite.texts)) and suite.name == f"pairs-{split}" and not suite.notices
        assert {split_of(scene) for scene in scenes} == {split}
        assert all(parse_pair_caption(text) == scene for text, scene in zip(suite.texts, scenes, strict=True))
        assert 0.05 < sum(scene.right is None for scene in scenes) / 400 < 0.35
        keys = [split_key(scene) for scene in scenes]
        assert len(set(keys[:150])) == 150 and len(set(keys)) > 170
    assert load_prompts("pairs-evaluation").texts == pair_prompts("evaluation").texts
    assert pair_prompts("evaluation", 40).texts != pair_prompts("evaluation", 40, seed=1).texts


def test_pair_prompts_where_and_limits():
    crosses = pair_prompts("selection", 60, where=lambda scene: scene.left.shape == "cross")
    assert len(crosses) == 60 and all(prompt.meta["scene"]["left"]["shape"] == "cross" for prompt in crosses)
    with pytest.raises(InputError, match="ask for fewer"):
        pair_prompts("evaluation", 5, where=lambda scene: False)
    with pytest.raises(InputError, match="'test' is no split"):
        pair_prompts("test")
