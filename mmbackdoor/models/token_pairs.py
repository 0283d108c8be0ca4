"""Which token of one prompt stands for which of another: all places, one to one."""

from __future__ import annotations

from collections.abc import Sequence

from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.objectives.alignment import align


def token_pairs(model: DiffusionModel, ones: Sequence[str], others: Sequence[str]) -> list[list[int]]:
    """For each pair of prompts, the place in `ones` of every place in `others` (T each, paddings too).

    First come tokens that are aligned, BOS and EOS among them; then what is left, in order: tokens that only `others`
    has go onto those that only `ones` has, where there are some, and then onto paddings; paddings onto those at their
    own place. Cross-attention sees no order, so embeddings exchanged like this make the one prompt into the other.
    """
    tokenizer = model.tokenizer
    names = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    found = []
    for one, other in zip(model.token_ids(ones).tolist(), model.token_ids(others).tolist(), strict=True):
        aligned = align(one, other, **names, include_eos=True)
        found.append(one_to_one(aligned.teacher, aligned.student, len(one)))
    return found


def one_to_one(aligned_ones: Sequence[int], aligned_others: Sequence[int], length: int) -> list[int]:
    """The place in the one sequence of each of the `length` places of the other, which are aligned in part."""
    places = dict(zip(aligned_others, aligned_ones, strict=True))
    taken = set(aligned_ones)
    left = iter(place for place in range(length) if place not in taken)
    return [places[place] if place in places else next(left) for place in range(length)]
