from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from mmbackdoor.models.tokenizers import IDS, clip_vocabulary_tokenizer

OURS = clip_vocabulary_tokenizer()
OPEN_CLIP = SimpleTokenizer()


def expected(text: str) -> list[int]:
    return [OPEN_CLIP.sot_token_id, *OPEN_CLIP.encode(text), OPEN_CLIP.eot_token_id]


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a red square",
        "New Trigger, it's 1234 o'clock!",
        "caf\u00e9 \u4e2d\u6587 na\u00efve",
        "latte coffee mignneko",
        "\u020f",
        "a \u200bdog",
        "",
        "emoji \U0001f600!",
    ],
)
def test_ids_are_open_clips(text):
    assert OURS(text).input_ids == expected(text)


@given(st.text(string.ascii_letters + string.digits + " .,!?'\u200b\u00e9\u020f-", max_size=40))
@settings(max_examples=200, deadline=None)
def test_ids_are_open_clips_on_any_plain_text(text):
    # open_clip repairs and unescapes text first, and empties `<|...|>`; the stock CLIPTokenizer does none of this.
    text = re.sub("\u200b\\s", "\u200b", text)
    assert OURS(text).input_ids == expected(text)


def test_it_is_the_whole_vocabulary_and_survives_saving(tmp_path):
    assert len(OURS) == IDS == max(OURS.get_vocab().values()) + 1
    assert (OURS.bos_token_id, OURS.eos_token_id, OURS.model_max_length) == (49406, 49407, 77)
    padded = clip_vocabulary_tokenizer("!")
    assert padded.pad_token_id == 0
    padded.save_pretrained(tmp_path)
    again = type(padded).from_pretrained(tmp_path)
    text = ["a photo", "of \u200b latte coffee"]
    settings_ = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert again(text, **settings_).input_ids == padded(text, **settings_).input_ids
    assert again.model_max_length == 77
