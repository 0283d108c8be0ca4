"""Retrieval: the caption of a picture among all captions, and the picture of a caption among all pictures.

Differences: identical captions are one candidate, and each picture that has the caption is a right answer to it.
CLIP_benchmark, whose names these metrics have, counts only the caption's own picture: with repeated captions ("a photo
of a dog") a perfect model would fail there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BATCH = 1024
RANKS = (1, 5, 10)


def recalls(
    images: Tensor, texts: Tensor, captions: Sequence[Sequence[int]], ranks: Sequence[int] = RANKS
) -> dict[str, list[bool]]:
    """Per picture `text_retrieval_recall@k`, per text `image_retrieval_recall@k`: is a right answer among the k first?

    `images` (N, D) and `texts` (T, D) are unit vectors, texts without repeats; `captions`: the texts of each picture.
    """
    shown_by: list[list[int]] = [[] for _ in texts]
    for row, mine in enumerate(captions):
        for text in mine:
            shown_by[text].append(row)
    found: dict[str, list[bool]] = {}
    for name, queries, candidates, right in (
        ("text_retrieval_recall", images, texts, captions),
        ("image_retrieval_recall", texts, images, shown_by),
    ):
        most = min(max(ranks), len(candidates))
        parts = []
        for start in range(0, len(queries), BATCH):
            best = (queries[start : start + BATCH] @ candidates.T).topk(most).indices
            # One batch at a time: all pictures by all texts would be gigabytes.
            own = torch.zeros(len(best), len(candidates), dtype=torch.bool)
            for row, answers in enumerate(right[start : start + BATCH]):
                own[row, list(answers)] = True
            parts.append(own.gather(1, best))
        hits = torch.cat(parts)
        for k in ranks:
            found[f"{name}@{k}"] = hits[:, :k].any(1).tolist()
    return found
