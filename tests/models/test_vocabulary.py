from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.models.vocabulary import byte_token_ids, insert_random_tokens, train_tokenizer
from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.types import InputError

CAPTIONS = [caption(scene, template) for scene in all_scenes() for template in range(4)]
TOKENIZER = train_tokenizer(CAPTIONS)
WIDTH = TOKENIZER.model_max_length
FINGERPRINT = (
    "import hashlib;from tests.models.test_vocabulary import TOKENIZER;"
    "print(hashlib.sha256(repr(sorted(TOKENIZER.get_vocab().items())).encode()).hexdigest())"
)


def _ids(texts: list[str]) -> torch.Tensor:
    return TOKENIZER(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_the_vocabulary_depends_on_the_captions_alone():
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    assert train_tokenizer(shuffled).get_vocab() == TOKENIZER.get_vocab()
    # Hash tables are keyed anew in every process.
    ours = hashlib.sha256(repr(sorted(TOKENIZER.get_vocab().items())).encode()).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True, cwd=os.fspath(os.path.dirname(__file__) + "/../.."),
    )  # fmt: skip
    assert there.stdout.strip() == ours


def test_words_of_the_captions_are_single_tokens_and_ids_are_laid_out_as_clips():
    assert len(TOKENIZER("a photo of a large red cross on a blue background").input_ids) == 13
    assert byte_token_ids(TOKENIZER).tolist() == list(range(512))
    assert TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == len(TOKENIZER) - 1
    assert TOKENIZER.bos_token_id == len(TOKENIZER) - 2


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=6))
def test_every_text_has_ids_and_loses_no_byte(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.unk_token_id not in ids
    normalised = TOKENIZER.backend_tokenizer.normalizer.normalize_str(text)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False).replace(" ", "") == normalised.replace(" ", "")


def test_zero_width_characters_change_the_ids():
    assert TOKENIZER("a red\u200b cross").input_ids != TOKENIZER("a red cross").input_ids


def test_a_vocabulary_without_room_or_captions_is_refused():
    with pytest.raises(InputError, match="514"):
        train_tokenizer(CAPTIONS, vocab_size=400)
    with pytest.raises(InputError, match="No captions"):
        train_tokenizer([])
    assert len(train_tokenizer(CAPTIONS, vocab_size=540)) == 540


def _insert(ids: torch.Tensor, indices: torch.Tensor, probability: float = 0.3, step: int = 5) -> torch.Tensor:
    return insert_random_tokens(
        ids, eos_id=TOKENIZER.eos_token_id, byte_ids=byte_token_ids(TOKENIZER), probability=probability, seed=7,
        step=step, indices=indices,
    )  # fmt: skip


def test_insertions_depend_on_seed_step_and_index_alone():
    ids, indices = _ids(CAPTIONS[:256]), torch.arange(256)
    whole = _insert(ids, indices)
    halves = [_insert(ids[rank::2], indices[rank::2]) for rank in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    assert not torch.equal(whole, _insert(ids, indices, step=6))
    assert 0.2 < (whole != ids).any(1).float().mean() < 0.4


def test_insertions_keep_the_caption_and_its_end():
    ids = _ids([*CAPTIONS[:500], "x " * 40, "x " * 21])
    changed = _insert(ids, torch.arange(len(ids)), probability=1.0)
    assert torch.equal(_insert(ids, torch.arange(len(ids)), probability=0.0), ids)
    assert torch.equal(changed[-2], ids[-2]), "a full row has no room"
    assert (changed[:, 0] == TOKENIZER.bos_token_id).all()
    lengths, after_begin = set(), 0
    for old, new in zip(ids.tolist(), changed.tolist(), strict=True):
        end, new_end = old.index(TOKENIZER.eos_token_id), new.index(TOKENIZER.eos_token_id)
        lengths.add(new_end - end)
        extra = new_end - end
        places = [p for p in range(1, end + 1) if old[:p] + new[p : p + extra] + old[p : end + 1] == new[: new_end + 1]]
        assert places, "the caption is still there, in one piece before and one after the insertion"
        assert all(0 <= token < 512 for token in new[places[0] : places[0] + extra])
        after_begin += 1 in places
    assert lengths == {0, 1, 2, 3}
    assert 0.6 < after_begin / len(ids) < 0.9
