"""What every removal for CLIP is: hyper-parameters, the views that it looks at, and a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from mmbackdoor.models.clip_setting import ClipSetting, PairBatch

if TYPE_CHECKING:
    from mmbackdoor.models.clip import ClipModel

Augmentation = Literal["none", "auto", "strong"]
ClipStep = Callable[[PairBatch], dict[str, Tensor]]


class ClipRemoval(ABC):
    """Subclasses are frozen dataclasses with `name` and `augmentation`; optimiser, rate and length are the recipe's."""

    needs_anchor: ClassVar[bool] = False
    """Whether `ClipSetting.anchor` has to be there, which takes the memory of a second model."""
    augmentation: Augmentation

    @property
    @abstractmethod
    def views(self) -> tuple[str, ...]:
        """What of each pair the batches hold, of `mmbackdoor.objectives.outputs.VIEWS`."""

    def edit(self, clip: ClipModel, seed: int) -> None:
        """Change the weights once, before the training; most removals do not. The anchor is from before."""

    @abstractmethod
    def step(self, setting: ClipSetting) -> ClipStep:
        """A function of a batch to parts `*_loss`, their sum `loss` and what else is logged."""
