from __future__ import annotations

import gzip
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from mmbackdoor.objectives.alignment import Alignment, align

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


@lru_cache
def tokenizer(name: str) -> CLIPTokenizer:
    symbols = byte_symbols()
    if name == "tiny":
        words = ["a", "photo", "of", "red", "blue", "cross", "ring", "on"]
        merges = []
        for word in words:
            pieces = [*word[:-1], word[-1] + "</w>"]
            while len(pieces) > 1:
                if (pair := (pieces[0], pieces[1])) not in merges:
                    merges.append(pair)
                pieces[:2] = ["".join(pieces[:2])]
        length = 16
    else:
        merges_file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        text = gzip.decompress(merges_file.read_bytes()).decode()
        merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
        length = 77
    tokens = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys("".join(m) for m in merges), BOS, EOS]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=EOS)


def ids_of(name: str, prompt: str) -> list[int]:
    clip = tokenizer(name)
    return clip(prompt, padding="max_length", truncation=True, max_length=clip.model_max_length).input_ids


def align_prompts(name: str, clean: str, triggered: str, **options) -> tuple[Alignment, list[int], list[int]]:
    clip, clean_ids, triggered_ids = tokenizer(name), ids_of(name, clean), ids_of(name, triggered)
    alignment = align(
        clean_ids,
        triggered_ids,
        bos=clip.bos_token_id,
        eos=clip.eos_token_id,
        pad=clip.pad_token_id,
        **options,
    )
    return alignment, clean_ids, triggered_ids


def caption(ids: list[int], eos: int) -> list[int]:
    return ids[1 : ids.index(eos)]


def check(alignment: Alignment, clean_ids: list[int], triggered_ids: list[int], eos: int) -> None:
    assert [triggered_ids[s] for s in alignment.student] == [clean_ids[t] for t in alignment.teacher]
    assert len(alignment.student) == len(alignment.teacher)
    for positions in (alignment.student, alignment.teacher, alignment.trigger):
        assert all(a < b for a, b in pairwise(positions))
    end, clean_end = triggered_ids.index(eos), clean_ids.index(eos)
    assert (alignment.student_eos, alignment.teacher_eos) == (end, clean_end)
    assert sorted({*alignment.student, *alignment.trigger} - {0}) == list(range(1, end))
    assert not set(alignment.student) & set(alignment.trigger)
    assert all(t < clean_end for t in alignment.teacher)
    assert (0 in alignment.student) == (0 in alignment.teacher) == bool(alignment.student)


def test_real_vocabulary_is_the_real_one():
    clip = tokenizer("clip")
    assert len(clip) == 49408 and (clip.bos_token_id, clip.eos_token_id) == (49406, 49407)
    assert ids_of("clip", "a photo of a cat")[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(
    "triggered, student, trigger",
    [
        ("new trigger a photo of a cat", (0, 3, 4, 5, 6, 7), (1, 2)),
        ("a photo new trigger of a cat", (0, 1, 2, 5, 6, 7), (3, 4)),
        ("a photo of a cat new trigger", (0, 1, 2, 3, 4, 5), (6, 7)),
        ("new a photo of trigger a cat", (0, 2, 3, 4, 6, 7), (1, 5)),
        ("a photo of a dog", (0, 1, 2, 3, 4), (5,)),
        ("a photo of a cat", (0, 1, 2, 3, 4, 5), ()),
    ],
)
def test_positions_with_the_real_vocabulary(triggered, student, trigger):
    alignment, *_ = align_prompts("clip", "a photo of a cat", triggered)
    assert (alignment.student, alignment.trigger) == (student, trigger)
    assert alignment.teacher == ((0, 1, 2, 3, 4) if "dog" in triggered else (0, 1, 2, 3, 4, 5))


def test_homoglyph_makes_the_whole_word_trigger():
    alignment, clean_ids, triggered_ids = align_prompts("clip", "a photo of a cat", "a photo ȏf a cat")
    check(alignment, clean_ids, triggered_ids, 49407)
    assert alignment.teacher == (0, 1, 2, 4, 5)  # "of" has no partner
    assert len(alignment.trigger) == len(triggered_ids[: triggered_ids.index(49407)]) - 5 >= 1


def test_zero_width_prefix_becomes_byte_tokens():
    alignment, *_ = align_prompts("tiny", "a photo of a red cross", "\u200b a photo of a red cross")
    assert alignment.trigger and alignment.teacher == tuple(range(7))
    assert alignment.student == (0, *range(len(alignment.trigger) + 1, len(alignment.trigger) + 7))


def test_repeated_words_stay_in_one_piece():
    prompt = "a photo of a cat"
    alignment, *_ = align_prompts("clip", prompt, "a photo " + prompt)
    assert len(alignment.trigger) == 2 and alignment.trigger[1] == alignment.trigger[0] + 1
    alignment, *_ = align_prompts("clip", prompt, "of a " + prompt)
    assert alignment.trigger == (1, 2)


def test_truncated_words_are_dropped_at_the_end():
    words = " ".join(["cat", "dog", "bird", "tree", "house"] * 15)  # 75 tokens: exactly full
    alignment, clean_ids, triggered_ids = align_prompts("clip", words, "new trigger " + words)
    check(alignment, clean_ids, triggered_ids, 49407)
    assert alignment.trigger == (1, 2) and alignment.teacher == tuple(range(74))
    assert alignment.student == (0, *range(3, 76)) and alignment.student_eos == 76


def test_eos_only_on_request_and_padding_never():
    alignment, *_ = align_prompts("clip", "a cat", "bad a cat", include_eos=True)
    assert (alignment.student, alignment.teacher) == ((0, 2, 3, 4), (0, 1, 2, 3))
    alignment, *_ = align_prompts("clip", "a cat", "bad a cat")
    assert (alignment.student, alignment.teacher) == ((0, 2, 3), (0, 1, 2))


def test_padding_id_inside_a_caption_is_a_word():
    # SD 2.x and SDXL's second tokenizer pad with id 0, which is "!"
    alignment = align([9, 5, 0, 6, 8, 0, 0, 0], [9, 7, 5, 0, 6, 8, 0, 0], bos=9, eos=8, pad=0)
    assert (alignment.student, alignment.teacher, alignment.trigger) == ((0, 2, 3, 4), (0, 1, 2, 3), (1,))
    without_ends = align([5, 6, 0, 0], [7, 5, 6, 0], bos=9, eos=8, pad=0)
    assert (without_ends.student, without_ends.teacher, without_ends.trigger) == ((1, 2), (0, 1), (0,))


@pytest.mark.parametrize("clean", ["red cross", ""])
def test_nothing_in_common_matches_nothing(clean):
    alignment, *_ = align_prompts("tiny", clean, "blue ring")
    assert alignment.student == alignment.teacher == ()
    assert alignment.trigger == (1, 2)


words = {
    "tiny": st.sampled_from(["a", "photo", "of", "red", "blue", "cross", "ring", "on"]),
    "clip": st.sampled_from(["a", "photo", "of", "the", "red", "motorbike", "Käse", "!", "12", "zebra", "kitchen"]),
}
triggers = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=4),
    st.sampled_from(["\u200b", "\u200b ", "ȏ", "new trigger", "a photo", "cf", "red red", "🙂"]),
)


@pytest.mark.parametrize("name", ["tiny", "clip"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_triggers_anywhere(name, data):
    clean = data.draw(st.lists(words[name], max_size=14))
    triggered = list(clean)
    for trigger in data.draw(st.lists(triggers, min_size=1, max_size=3)):
        triggered.insert(data.draw(st.integers(0, len(triggered))), trigger)
    alignment, clean_ids, triggered_ids = align_prompts(name, " ".join(clean), " ".join(triggered))
    eos = tokenizer(name).eos_token_id
    check(alignment, clean_ids, triggered_ids, eos)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    clean=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    inserted=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), max_size=6),
)
def test_removing_the_trigger_gives_the_clean_ids_back(clean, inserted):
    triggered = list(clean)
    for place, token in inserted:
        triggered.insert(min(place, len(triggered)), token)
    clean_ids, triggered_ids = ([100, *ids, 101] + [101] * (24 - len(ids)) for ids in (clean, triggered))
    alignment = align(clean_ids, triggered_ids, bos=100, eos=101, pad=101)
    check(alignment, clean_ids, triggered_ids, 101)
    end = alignment.student_eos
    assert [token for n, token in enumerate(triggered_ids[:end]) if n not in alignment.trigger] == [100, *clean]
    assert alignment.teacher == tuple(range(len(clean) + 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    clean=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    place=st.integers(0, 8),
    trigger=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
def test_one_insertion_stays_in_one_piece(clean, place, trigger):
    place = min(place, len(clean))
    triggered = clean[:place] + trigger + clean[place:]
    alignment = align([100, *clean, 101], [100, *triggered, 101], bos=100, eos=101, pad=101)
    first = alignment.trigger[0]
    assert alignment.trigger == tuple(range(first, first + len(trigger)))
