"""Real pictures as the reference of KID and the Frechet distance, in place of what the model before a removal made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from mmbackdoor.evaluate.clip_data import ClipData, chosen_keys, decoded, open_data, undecoded
from mmbackdoor.evaluate.metrics import clip_score
from mmbackdoor.evaluate.metrics.clip_score import Judge
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.train.batches import to_tensor
from mmbackdoor.types import InputError, Sample


@dataclass(frozen=True)
class Reference:
    """Pictures of shards, those with `keys` (`None`: all), under the name that records give them."""

    name: str
    data: ClipData
    keys: frozenset[str] | None = None

    @staticmethod
    def of(shards: str, samples: int | None) -> Reference:
        """`samples` pictures of `shards` (or of a folder in CLIP_benchmark's layout), picked by a hash of their keys.

        Raises `InputError` where there are no shards, or fewer than two pictures in them.
        """
        data = open_data(shards)
        keys = chosen_keys(data, samples, 0)
        if len(list(islice(undecoded(data, BadSamples(), keys), 2))) < 2:
            raise InputError(f"{shards!r} has fewer than two pictures, and a distance needs two; give other shards")
        return Reference(f"pictures of {shards}", data, keys)

    def features(self, judge: Judge, resolution: int) -> torch.Tensor:
        """(N, D) float32 features of the pictures that can be read, each brought to the size that the models draw
        (shorter side resized, centre cropped) before the judge brings it to its own."""
        parts, rows = [], []
        for sample in self._samples():
            rows.append(to_tensor(sample.image, resolution))
            if len(rows) == clip_score.BATCH:
                parts.append(clip_score.features(torch.stack(rows), judge))
                rows = []
        if rows:
            parts.append(clip_score.features(torch.stack(rows), judge))
        if sum(map(len, parts)) < 2:
            raise InputError(f"fewer than two {self.name} can be read; check them with `mmbackdoor shards check`")
        return torch.cat(parts)

    def _samples(self) -> Iterator[Sample]:
        for _, path, entry in undecoded(self.data, BadSamples(), self.keys):
            one = decoded(path, entry)
            if isinstance(one, Sample):
                yield one
