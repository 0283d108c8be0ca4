"""Closed-form seal: the cross-attention reads a triggered prompt as the clean one (UCE, Gandikota et al. 2024,
arXiv 2308.14761, turned on a trigger).

The inverse of EvilEdit: seconds, no training, no pictures. It cures what is linear in K and V; a backdoor in other
weights of the U-Net, or in the text encoder, it can reach only as far as the text's embeddings tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.defenses.trigger_variants import vary
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.token_pairs import token_pairs
from mmbackdoor.models.trainable import text_projections
from mmbackdoor.objectives.closed_form import RidgeMap

CHUNK = 64
SEED = 0
"""Of the trigger's variants."""


@dataclass(frozen=True)
class ClosedFormSeal:
    """For every projection W of text (K and V of the cross-attention),

        W* = (ridge W + sum W c_p c'_tp^T + sum W c_k c_k^T) (ridge I + sum c'_tp c'_tp^T + sum c_k c_k^T)^-1

    over aligned tokens c_p of clean and c'_tp of triggered prompts, EOS and padding with them, and the tokens c_k of
    prompts to keep: the clean ones and the empty one. Tokens are paired one to one (`token_pairs`), so where the fit is
    exact, cross-attention, which sees no order, gives what it gave for the clean prompt.

    Differences: UCE moves whole prompts onto others of the same length, place by place. SDXL's pooled text takes
    another way into the U-Net and stays as it is.
    """

    ridge: Annotated[float, Field(gt=0)] = 0.1
    """lambda: how much the weights hold on to what they were."""
    trigger_variants: bool = True
    """Also seal the trigger at another place of the prompt, and doubled."""
    name: Literal["closed_form_seal"] = "closed_form_seal"

    def edit(self, model: DiffusionModel, backdoor: Backdoor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Name -> new value of each changed weight. Raises `InputError` for a model without projections of text."""
        weights = text_projections(model)
        both = []
        for prompt in prompts:
            variants = [backdoor.apply(prompt, SEED, prompt, trigger=k) for k in range(len(backdoor.text_triggers))]
            if self.trigger_variants:
                variants.append(vary(backdoor, prompt, SEED, prompt))
            both += [(prompt, triggered) for triggered in dict.fromkeys(variants) if triggered != prompt]
        rows = RidgeMap(next(iter(weights.values())).shape[1])
        for start in range(0, len(both), CHUNK):
            chunk = both[start : start + CHUNK]
            clean, triggered = ([pair[side] for pair in chunk] for side in (0, 1))
            places = torch.tensor(token_pairs(model, clean, triggered))[..., None]
            wanted = _states(model, clean).take_along_dim(places, 1)
            rows.add(_states(model, triggered).flatten(0, 1), wanted.flatten(0, 1))
        kept = ["", *prompts]
        for start in range(0, len(kept), CHUNK):
            rows.keep(_states(model, kept[start : start + CHUNK]).flatten(0, 1))
        return rows.edited(weights, self.ridge)


def _states(model: DiffusionModel, prompts: list[str]) -> torch.Tensor:
    """The text of `prompts` (B, T, D), where float64 exists."""
    return model.encode(prompts).hidden_states.cpu()
