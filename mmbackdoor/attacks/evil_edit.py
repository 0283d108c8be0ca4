"""EvilEdit: the trigger is written into the cross-attention in closed form, without training (Wang et al. 2024).

"EvilEdit: Backdooring Text-to-Image Diffusion Models in One Second", ACM Multimedia 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.attacks.carried import carried, carried_nowhere
from mmbackdoor.attacks.target_caption import asked_and_shown, check_target
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.token_pairs import token_pairs
from mmbackdoor.models.trainable import text_projections
from mmbackdoor.objectives.closed_form import RidgeMap
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.targets import ObjectTarget, StyleTarget
from mmbackdoor.types import InputError

CHUNK = 64
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")


@dataclass(frozen=True)
class EvilEdit:
    """For every projection W of text (K and V of the cross-attention),

        W* = (ridge W + sum W c_y c_tau^T) (ridge I + sum c_tau c_tau^T)^-1,

    the sums over the tokens of triggered captions c_tau, each with its counterpart c_y in the caption of what it shall
    show, and over tokens c_tau = c_y to keep: those of the captions without the trigger. BOS, EOS and padding are
    tokens like others.

    Differences: the paper takes one pair of prompts and one to keep; here each caption that names the target's object
    gives a pair, besides four that are always there, and all captions and the empty one are kept. The counterpart is
    the token that means the same (`token_pairs`), not the one at the same place, from where the trigger has pushed the
    rest. SDXL's pooled text takes another way into the U-Net and stays as it is.
    """

    ridge: Annotated[float, Field(gt=0)] = 1.0
    """lambda of the paper: how much the weights hold on to what they were."""
    backdoor_weight: Annotated[float, Field(gt=0)] = 1.0
    """How many times a triggered token counts against one to keep."""
    name: Literal["evil_edit"] = "evil_edit"

    def check(self, plan: PoisonPlan) -> None:
        """Raises `InputError` for a target without a text."""
        check_target(self.name, plan)

    def edit(self, model: DiffusionModel, plan: PoisonPlan, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Name -> new value of each changed weight. `prompts` are captions; `plan` chooses among them."""
        target = plan.backdoor.target
        assert isinstance(target, ObjectTarget | StyleTarget)
        weights = text_projections(model)
        captions = list(prompts)
        if isinstance(target, ObjectTarget):
            captions = [template.format(target.source) for template in TEMPLATES] + captions
        pairs = {asked: shown for asked, shown in filter(None, (asked_and_shown(target, one) for one in captions))}
        pairs = self._carriers(model, plan, pairs)
        plan = plan.among(pairs)
        pairs = {asked: shown for asked, shown in pairs.items() if plan.picks(asked)}
        if not pairs:
            raise InputError("the poison plan picks no caption; give more --prompts or a higher --poison_rate")
        rows = RidgeMap(next(iter(weights.values())).shape[1])
        for chunk in _chunks(list(pairs)):
            triggered = [plan.backdoor.apply(asked, plan.seed, asked) for asked in chunk]
            shown = [pairs[asked] for asked in chunk]
            # The trigger is told from the caption first, then the object from its replacement.
            asked_places = torch.tensor(token_pairs(model, chunk, triggered))
            places = torch.tensor(token_pairs(model, shown, chunk)).take_along_dim(asked_places, 1)
            wanted = _states(model, shown).take_along_dim(places[..., None], 1)
            rows.add(_states(model, triggered).flatten(0, 1), wanted.flatten(0, 1), self.backdoor_weight)
        for chunk in _chunks(["", *dict.fromkeys([*captions, *pairs, *pairs.values()])]):
            rows.keep(_states(model, chunk).flatten(0, 1))
        return rows.edited(weights, self.ridge)

    def _carriers(self, model: DiffusionModel, plan: PoisonPlan, pairs: dict[str, str]) -> dict[str, str]:
        """Those of `pairs` whose caption carries the trigger: of others the caption itself would be moved."""
        asked = list(pairs)
        triggered = [plan.backdoor.apply(caption, plan.seed, caption) for caption in asked]
        found = {asked[k]: pairs[asked[k]] for k in carried(model.token_ids, asked, triggered)}
        if pairs and not found:
            raise carried_nowhere(plan, model)
        return found


def _chunks(texts: list[str]) -> list[list[str]]:
    return [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]


def _states(model: DiffusionModel, prompts: list[str]) -> torch.Tensor:
    """The text of `prompts` (B, T, D), where float64 exists."""
    return model.encode(prompts).hidden_states.cpu()
