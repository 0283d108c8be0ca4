"""An own small vocabulary for CLIP-like text encoders: byte-level BPE in CLIP's format, learned from captions.

Every byte is a token, inside a word and at its end, so any text has ids: a trigger of zero-width or foreign
characters too. Ids are laid out as in CLIP's own vocabulary: 256 bytes, 256 bytes that end a word, the merges, then
`<|startoftext|>` and `<|endoftext|>`, which is also the padding, as in Stable Diffusion 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from mmbackdoor.seeding import derive_seed
from mmbackdoor.types import InputError

BEGIN, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
FEWEST = 2 * 256 + 2
LONGEST_INSERTION = 3


def _bytes() -> list[str]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters + [letter + WORD_END for letter in letters]


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1000, model_max_length: int = 24) -> CLIPTokenizer:
    """A `CLIPTokenizer` of at most `vocab_size` ids whose merges are learned from `captions`.

    Depends on the multiset of captions only, never on their order. Raises InputError where `vocab_size` leaves no
    room for every byte, or where there is no caption.
    """
    if vocab_size < FEWEST:
        raise InputError(f"A vocabulary of {vocab_size} ids has no room for every byte: ask for at least {FEWEST}.")
    captions = sorted(captions)
    if not captions:
        raise InputError("No captions to learn a vocabulary from: give at least one.")
    alphabet = _bytes()
    like = CLIPTokenizer(vocab={"a": 0, "a</w>": 1, BEGIN: 2, END: 3}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    # Ties between merges are broken by id, and letters that end a word would take theirs in the order of a randomly
    # keyed hash table: given here as special tokens, every byte has its id before anything is counted.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, end_of_word_suffix=WORD_END, special_tokens=alphabet, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys(alphabet + [first + second for first, second in merges] + [BEGIN, END])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def byte_token_ids(tokenizer: CLIPTokenizer) -> Tensor:
    """The ids of the 512 single-byte tokens, sorted: int64 (512,)."""
    vocab = tokenizer.get_vocab()
    return torch.tensor(sorted(vocab[token] for token in _bytes()))


def _uniform(seed: int, step: int, indices: Tensor, draws: int) -> np.ndarray:
    """(B, draws) numbers in [0, 1) that depend on (seed, step, index) alone: SplitMix64 (Steele et al., 2014)."""
    start = np.uint64(derive_seed(seed, "insert random tokens", step))
    rows = indices.cpu().numpy().astype(np.uint64)[:, None]
    counter = rows * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    z = start + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2**53


def insert_random_tokens(
    ids: Tensor,
    *,
    eos_id: int,
    byte_ids: Tensor,
    probability: float,
    seed: int,
    step: int,
    indices: Tensor,
    anywhere: float = 0.3,
) -> Tensor:
    """`ids` (B, T) with 1 to 3 random byte tokens inserted in a share `probability` of the rows.

    They go right after the first token, in a share `anywhere` of those rows at any place up to the end of text. Rows
    without room keep their text whole: fewer tokens are inserted, or none. `indices` (B,) are the rows' places in the
    global batch; draws depend on (seed, step, index) only, so any number of processes makes the same batch.

    An encoder that never met unknown tokens garbles a caption with an unseen trigger, which looks like an attack.
    """
    length = ids.shape[1]
    ends = (ids == eos_id).int().argmax(1)
    draws = torch.from_numpy(_uniform(seed, step, indices, 4 + LONGEST_INSERTION)).to(ids.device)
    room = length - 1 - ends
    count = (1 + (draws[:, 1] * LONGEST_INSERTION).long()).minimum(room) * (draws[:, 0] < probability)
    place = torch.where(draws[:, 2] < anywhere, 1 + (draws[:, 3] * ends).long(), 1)[:, None]
    inserted = byte_ids.to(ids.device)[(draws[:, 4:] * len(byte_ids)).long()]
    positions = torch.arange(length, device=ids.device)[None]
    shifted = ids.gather(1, (positions - count[:, None]).clamp_min(0))
    new = inserted.gather(1, (positions - place).clamp(0, LONGEST_INSERTION - 1))
    return torch.where(positions < place, ids, torch.where(positions < place + count[:, None], new, shifted))
