"""The step that CleanCLIP and its variants share: one forward pass over all views, then CLIP with self-supervision."""

from __future__ import annotations

from torch import Tensor

from mmbackdoor.defenses.clip.removal import ClipStep
from mmbackdoor.models.clip_setting import ClipSetting, PairBatch
from mmbackdoor.objectives.clip_ssl import ClipSsl


def self_supervised_step(objective: ClipSsl, setting: ClipSetting) -> ClipStep:
    def step_fn(batch: PairBatch) -> dict[str, Tensor]:
        outputs = setting.encode(batch, objective.views)
        return objective(outputs, batch.captions, rank=setting.rank, world_size=setting.world_size)

    return step_fn
