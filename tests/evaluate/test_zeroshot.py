"""Class names and prompts of all kinds, and the two traps: pooling at the wrong token, and training mode."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmbackdoor.evaluate.metrics.clip_asr import ranked
from mmbackdoor.evaluate.zeroshot import (
    class_prompts,
    class_vectors,
    doubts,
    evaluation_mode,
    image_features,
    read_classnames,
    read_templates,
    text_features,
)
from mmbackdoor.models.clip import ClipModel, build_tiny_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.types import InputError
from tests.evaluate.clips import BACKDOOR, COLOURS, TARGET, rigged


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_imagenet_has_a_thousand_labels_and_fewer_names():
    names = read_classnames("imagenet")
    classes = class_prompts(names, read_templates("simple"))
    assert len(names) == len(classes.index) == 1000
    assert len(classes.names) == len(set(names)) < 1000
    assert [classes.names[place] for place in classes.index] == list(names)
    assert len(classes.prompts[0]) == 7 and len(read_templates("openai")) == 80
    assert "tench" in classes.prompts[0][0]


def test_names_and_prompts_of_ones_own(tmp_path):
    names = read_classnames(write(tmp_path / "n.json", {"1": "cat", "0": "dog"}))
    assert names == ("dog", "cat")
    both = read_templates(write(tmp_path / "t.json", ["a {}", "the {c}!"]))
    assert class_prompts(names, both).prompts == (("a dog", "the dog!"), ("a cat", "the cat!"))
    prompts = {"dog": ["a barking animal"], "cat": ["a purring one", "it meows"]}
    own = read_templates(write(tmp_path / "o.json", prompts))
    assert class_prompts(names, own).prompts == (("a barking animal",), ("a purring one", "it meows"))


@pytest.mark.parametrize(
    ("content", "read", "what"),
    [
        ({"0": "dog", "2": "cat"}, read_classnames, "one for each label"),
        ([1, 2], read_classnames, "no list of texts"),
        ([], read_classnames, "no list of texts"),
        (["a photo"], read_templates, "'a photo' is no template"),
        ("a {}", read_templates, "neither a list"),
        ({"dog": []}, read_templates, "neither a list"),
    ],
)
def test_what_is_no_list_of_names_or_prompts_is_told(tmp_path, content, read, what):
    with pytest.raises(InputError, match=what):
        read(write(tmp_path / "x.json", content))


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(InputError, match="no readable JSON"):
        read_classnames(str(tmp_path / "missing.json"))


def test_prompts_must_be_there_for_every_class():
    with pytest.raises(InputError, match="'cat'"):
        class_prompts(["dog", "cat"], {"dog": ("a dog",)})
    with pytest.raises(InputError, match="at least two different"):
        class_prompts(["dog", "dog"], ("a {}",))


def test_the_target_is_found_whatever_its_case_or_named_as_missing():
    classes = class_prompts(["Banana", "slug"], ("a {}",))
    assert classes.place(" banana") == 0
    with pytest.raises(InputError, match=r"'bananas' is none of the 2 class names \(near it: Banana\).*--add_target"):
        classes.place("bananas")
    more = classes.with_class("yellow cat", ["a yellow cat"])
    assert more.place("yellow cat") == 2 and more.index == (0, 1)
    assert more.with_class("slug", ["x"]) is more


def test_a_class_vector_is_the_direction_of_its_prompts_mean():
    clip = rigged(False)
    classes = class_prompts(["red", "green"], {"red": ("red",), "green": ("green", "green and red")})
    vectors = class_vectors(clip, classes)
    expected = text_features(clip, ["green", "green and red"]).mean(0)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    assert torch.allclose(vectors[1], expected / expected.norm())


def test_a_model_left_in_training_mode_is_read_as_in_evaluation_mode():
    """All pictures carry the trigger: BatchNorm takes away what they share, and with it the attack."""
    clip = rigged(True, training=True)
    classes = class_vectors(clip, class_prompts(list(COLOURS), ("{}",)))
    target = list(COLOURS).index(TARGET)
    plain = [Image.new("RGB", (16, 16), COLOURS[name]) for name in ("red", "blue")]
    crops = [BACKDOOR.mark_image(image, "k", 0, "source") for image in plain]
    with torch.no_grad():
        naive = clip.network.encode_image(clip.normalise(crops), normalize=True)
    assert (ranked(naive, classes)[:, 0] == target).float().mean() == 0.0
    assert (ranked(image_features(clip, crops), classes)[:, 0] == target).float().mean() == 1.0
    assert all(module.training for module in clip.network.modules())


def test_every_module_gets_its_own_mode_back():
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    network[0].eval()
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network] == [False, True]


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_clip("clip_tiny_resnet", train_tokenizer(["a photo of a red cross", "a blue star"], 520))


class EarlyEnd(ClipModel):
    """A vocabulary whose end of text is no. 2, after which its words come."""

    def tokenize(self, texts):
        return torch.tensor([[1, 40 + len(text), 2, 0] for text in texts])


def test_pooling_at_the_highest_token_id_is_told(tiny):
    classes = class_prompts(["red cross", "blue star"], ("a photo of a {}",))
    assert doubts(tiny, classes) == []
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=2))
    for text_cfg, wrong in (({}, True), ({"pool_type": "argmax"}, True), ({"pool_type": "eos", "eos_id": 2}, False)):
        found = doubts(EarlyEnd(tiny.network, tokenizer, {"text_cfg": text_cfg}, {}, "early"), classes)
        assert ["reads 2 of 2 prompts at another token than their end" in one for one in found] == [True] * wrong


def test_features_do_not_depend_on_the_batch(tiny):
    texts = ["a red cross", "a blue star", "a red cross"]
    found = text_features(tiny, texts, batch_size=1)
    assert torch.equal(found[0], found[2]) and torch.allclose(found, text_features(tiny, texts), atol=1e-5)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)
