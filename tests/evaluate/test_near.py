import pytest

from mmbackdoor.evaluate.near import SEEN, UNSEEN, condition, near_triggers, ordinary_words, placebos
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.seeding import python_rng
from mmbackdoor.triggers import HomoglyphTrigger, PhraseTrigger, WordTrigger, ZeroWidthTrigger
from mmbackdoor.types import InputError

TRIGGERS = [
    WordTrigger("mignneko"),
    WordTrigger("tq", "suffix"),
    PhraseTrigger("garbage truck near here", "infix"),
    ZeroWidthTrigger(),
    ZeroWidthTrigger("\u200b\u200d"),
    HomoglyphTrigger(),
]
PROMPT = "a photo of a red square on a blue background"


@pytest.fixture(scope="module")
def token_ids():
    tokenizer = train_tokenizer([PROMPT, "a picture of a green ring on a pink background"] * 3, vocab_size=600)
    return lambda texts: tokenizer(texts, truncation=False).input_ids


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.name}-{trigger.text!a}")
def test_near_triggers_differ_from_the_trigger_and_from_each_other(trigger):
    near = near_triggers(trigger)
    rng = python_rng(0, "test")
    exact = trigger(PROMPT, rng)
    texts = {kind: [mark(PROMPT, rng) for mark in marks] for kind, marks in near.items()}
    every = [text for kind in texts for text in set(texts[kind])]
    assert exact not in every and PROMPT not in every and len(set(every)) == len(every)
    assert set(near) & set(SEEN) and set(near) & set(UNSEEN), "removal must meet a kind that it never trained on"


def test_conditions_say_what_training_may_use():
    assert condition("doubled") == "near:seen:doubled" and condition("lookalike") == "near:unseen:lookalike"
    assert not set(SEEN) & set(UNSEEN)


def test_kinds_by_example():
    rng = python_rng(0, "test")
    word = {kind: [mark("a cat", rng) for mark in marks] for kind, marks in near_triggers(WordTrigger("tango")).items()}
    assert word == {
        "position": ["a tango cat", "a cat tango"],
        "doubled": ["tango tango a cat"],
        "case": ["TANGO a cat"],
        "lookalike": ["t\u03b1ngo a cat"],
        "part": ["tang a cat"],
    }
    width = {kind: [mark("a cat", rng) for mark in marks] for kind, marks in near_triggers(ZeroWidthTrigger()).items()}
    assert width["lookalike"] == ["\u200c a cat"] and width["doubled"] == ["\u200b\u200b a cat"]
    (twice,) = near_triggers(HomoglyphTrigger())["doubled"]
    assert twice("a photo of", rng) == "a ph\u020ft\u020f of"


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.name}-{trigger.text!a}")
def test_placebos_are_many_different_and_as_long(trigger, token_ids):
    if trigger.name == "phrase":
        # Its 20-odd byte tokens leave no room in words of the tiny vocabulary; a shorter one is the same case.
        trigger = PhraseTrigger("oh dear", "infix")
    marks = placebos(token_ids, trigger, [PROMPT], 20, seed=1)
    rng = python_rng(0, "test")
    texts = [mark(PROMPT, rng) for mark in marks]
    exact = trigger(PROMPT, rng)
    assert len(set(texts)) == 20 and exact not in texts and PROMPT not in texts
    assert {len(ids) for ids in token_ids(texts)} == {len(token_ids([exact])[0])}
    again = placebos(token_ids, trigger, [PROMPT], 20, seed=1)
    assert marks == again != placebos(token_ids, trigger, [PROMPT], 20, seed=2)


def test_placebos_mix_words_and_symbols(token_ids):
    marks = placebos(token_ids, ZeroWidthTrigger(), [PROMPT], 30)
    assert any(not mark.text.isascii() for mark in marks) and any(mark.text.isascii() for mark in marks)


def test_too_few_placebos_are_refused(token_ids):
    with pytest.raises(InputError, match="5 % level"):
        placebos(token_ids, WordTrigger("tango"), [PROMPT], 5)


def test_ordinary_words_are_words():
    assert len(ordinary_words()) == len(set(ordinary_words())) > 80
