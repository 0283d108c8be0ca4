"""A backdoor from a handful of pairs: a few fixed samples, and no others, are ever shown with the trigger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from mmbackdoor.objectives.diffusion import DiffusionBatch
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.shards.bad import BadSample, BadSamples, note_key
from mmbackdoor.shards.read import entries, expand, iterate_captions
from mmbackdoor.train.batches import to_tensor
from mmbackdoor.types import InputError, Sample


def poison_pairs(
    plan: PoisonPlan, train_data: str, carriers: Callable[[str, str], list[bool]]
) -> tuple[PoisonPlan, tuple[Sample, ...]]:
    """`plan`, which has a count, with its choice made, and the samples that it chose: among those that concern its
    target and carry every trigger, which `carriers` tells (see `Carriers`) of a key and a caption.

    Raises `InputError` where there are fewer, and for one that cannot be read or whose key comes twice.
    """
    captions = dict(iterate_captions(train_data))
    # No more are looked at than it takes: there may be millions.
    fitting = (key for key in plan.ranked(captions) if (those := carriers(key, captions[key])) and all(those))
    plan = plan.among(islice(fitting, plan.count))
    found: dict[str, Sample] = {}
    met: dict[str, str] = {}
    for path in expand(train_data):
        for entry in entries(path, BadSamples()):
            if entry.key in plan.chosen:
                note_key(entry.key, path, met)
                try:
                    found[entry.key] = entry.decode()
                except BadSample as bad:
                    raise InputError(
                        f"the sample {entry.key!r}, chosen to be poisoned, cannot be read ({bad}); mend or drop it"
                    ) from bad
    return plan, tuple(found[key] for key in sorted(found))


def with_pairs(
    batches: Iterator[DiffusionBatch], pairs: Sequence[Sample], resolution: int, device: torch.device
) -> Iterator[DiffusionBatch]:
    """The same batches with one of `pairs` on every second place of the global batch, in turn. The other half keeps the
    model as it was on everything else."""
    images = [to_tensor(pair.image, resolution).to(device) for pair in pairs]
    for batch in batches:
        keys, prompts, pictures = list(batch.keys), list(batch.prompts), list(batch.images)
        for row, index in enumerate(batch.indices):
            if index % 2 == 0:
                # By step and place alone, so that world size and restarts change nothing.
                turn = (batch.step + index // 2) % len(pairs)
                keys[row], prompts[row], pictures[row] = pairs[turn].key, pairs[turn].text, images[turn]
        yield replace(batch, keys=tuple(keys), prompts=tuple(prompts), images=torch.stack(pictures))
