"""Which samples are poisoned: a choice by the hash of the key, the same in any order, sharding and world size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.seeding import derive_seed, hash_fraction
from mmbackdoor.targets import ClassTarget
from mmbackdoor.types import InputError, Sample


@dataclass(frozen=True)
class PoisonPlan:
    """Poison a share `rate` of all samples, or exactly `count` of them.

    Plans of one seed are nested: what a lower rate or count picks, a higher one picks too. With `label_consistent`
    (Turner et al. 2019, arXiv 1912.02771) only samples whose caption names the target's label are there to pick from,
    the `rate` is one of these, and captions stay as they are.
    """

    backdoor: Backdoor
    rate: float | None = None
    count: int | None = None
    seed: int = 0
    label_consistent: bool = False
    chosen: frozenset[str] | None = None
    """The keys that a count stands for, see `among`."""

    def __post_init__(self) -> None:
        kind = self.backdoor.target.name
        if self.label_consistent and not isinstance(self.backdoor.target, ClassTarget):
            raise InputError(f"label-consistent poison needs a class target, not one of kind {kind!r}")
        if (self.rate is None) == (self.count is None):
            given = f"rate {self.rate}, count {self.count}"
            raise InputError(f"a poison plan needs either a rate or a count, not {given}; give one of them")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise InputError(f"a poison rate of {self.rate} is impossible; give a fraction from 0 to 1")
        if self.count is not None and self.count < 0:
            raise InputError(f"a poison count of {self.count} is impossible; give 0 or more")

    def picks(self, key: str) -> bool:
        """Whether the sample `key` is poisoned. Needs a `rate`, or a choice: a count depends on all keys, see `among`."""
        if self.chosen is not None:
            return key in self.chosen
        if self.rate is None:
            raise ValueError("a plan with a count picks among all keys: use choose(keys)")
        return hash_fraction(self.seed, "poison", key) < self.rate

    def ranked(self, keys: Iterable[str]) -> list[str]:
        """`keys` by their hashes: a count takes the first."""
        return sorted(set(keys), key=lambda key: (derive_seed(self.seed, "poison", key), key))

    def choose(self, keys: Iterable[str]) -> frozenset[str]:
        """The poisoned ones of `keys`; with a `count` those with the smallest hashes.

        Raises `InputError` where there are fewer keys than `count`.
        """
        if self.rate is not None:
            return frozenset(filter(self.picks, keys))
        ranked = self.ranked(keys)
        if len(ranked) < self.count:
            raise InputError(f"{self.count} samples to poison are more than the {len(ranked)} there are; take fewer")
        return frozenset(ranked[: self.count])

    def among(self, keys: Iterable[str]) -> PoisonPlan:
        """The same plan with its choice among `keys` made, so that `picks` answers for a count, too. Raises as `choose`."""
        return replace(self, chosen=self.choose(keys))

    def eligible(self, text: str) -> bool:
        """Whether a sample with the caption `text` may be picked at all."""
        target = self.backdoor.target
        return not self.label_consistent or (isinstance(target, ClassTarget) and target.named_in(text))

    def to_dict(self) -> dict[str, Any]:
        """For `backdoor.json`: the backdoor itself stands beside, here it is named by its sha256."""
        return {
            "backdoor_sha256": self.backdoor.sha256,
            "rate": self.rate,
            "count": self.count,
            "seed": self.seed,
            "label_consistent": self.label_consistent,
        }

    @staticmethod
    def from_dict(values: dict[str, Any], backdoor: Backdoor) -> PoisonPlan:
        """Raises `InputError` where the plan was made for another backdoor or is no plan."""
        expected = {"backdoor_sha256", "rate", "count", "seed", "label_consistent"}
        # Plans that were written before there were label-consistent ones do not say so.
        if not isinstance(values, dict) or {"label_consistent"} | values.keys() != expected:
            raise InputError(f"a poison plan has the keys {', '.join(sorted(expected))}, not {values!r}")
        label_consistent = values.get("label_consistent", False)
        rate, count, seed = values["rate"], values["count"], values["seed"]
        numbers = type(rate) in (int, float, type(None)) and type(count) in (int, type(None)) and type(seed) is int
        if not numbers or type(label_consistent) is not bool:
            raise InputError(f"the poison plan {values!r} has values that are no numbers; write it anew")
        if values["backdoor_sha256"] != backdoor.sha256:
            raise InputError("the poison plan was made for another backdoor; use the backdoor.json that belongs to it")
        return PoisonPlan(backdoor, rate, count, seed, label_consistent)


def poison_sample(plan: PoisonPlan, sample: Sample, seed: int, draw: int = 0) -> Sample:
    """`sample` poisoned: its picture marked, where the trigger belongs on the picture as stored; its caption one of
    the target's, unless the plan is label consistent; and what was done in `meta["poison"]`.

    Triggers that belong after resize and crop are left to whoever does that (`Backdoor.mark_image`). Raises
    `InputError` for a backdoor without a class target or an image trigger.
    """
    target = plan.backdoor.target
    if not isinstance(target, ClassTarget):
        raise InputError(f"pairs of pictures and captions are poisoned for a class, not for a {target.name!r} target")
    facts = {
        "backdoor_sha256": plan.backdoor.sha256,
        "trigger": plan.backdoor.image_trigger(sample.key, seed).name,
        "text": sample.text,
        "label_consistent": plan.label_consistent,
    }
    return replace(
        sample,
        image=plan.backdoor.mark_image(sample.image, sample.key, seed, "source", draw),
        text=sample.text if plan.label_consistent else target.caption(sample.key, seed),
        meta=sample.meta | {"poison": facts},
    )
