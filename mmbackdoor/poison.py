"""Which samples are poisoned: a choice by the hash of the key, the same in any order, sharding and world size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.seeding import derive_seed, hash_fraction
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class PoisonPlan:
    """Poison a share `rate` of all samples, or exactly `count` of them.

    Plans of one seed are nested: what a lower rate or count picks, a higher one picks too.
    """

    backdoor: Backdoor
    rate: float | None = None
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.count is None):
            given = f"rate {self.rate}, count {self.count}"
            raise InputError(f"a poison plan needs either a rate or a count, not {given}; give one of them")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise InputError(f"a poison rate of {self.rate} is impossible; give a fraction from 0 to 1")
        if self.count is not None and self.count < 0:
            raise InputError(f"a poison count of {self.count} is impossible; give 0 or more")

    def picks(self, key: str) -> bool:
        """Whether the sample `key` is poisoned. Needs a `rate`: a count depends on all keys, see `choose`."""
        if self.rate is None:
            raise ValueError("a plan with a count picks among all keys: use choose(keys)")
        return hash_fraction(self.seed, "poison", key) < self.rate

    def choose(self, keys: Iterable[str]) -> frozenset[str]:
        """The poisoned ones of `keys`; with a `count` those with the smallest hashes.

        Raises `InputError` where there are fewer keys than `count`.
        """
        if self.rate is not None:
            return frozenset(filter(self.picks, keys))
        ranked = sorted(set(keys), key=lambda key: (derive_seed(self.seed, "poison", key), key))
        if len(ranked) < self.count:
            raise InputError(f"{self.count} samples to poison are more than the {len(ranked)} there are; take fewer")
        return frozenset(ranked[: self.count])

    def to_dict(self) -> dict[str, Any]:
        """For `backdoor.json`: the backdoor itself stands beside, here it is named by its sha256."""
        return {"backdoor_sha256": self.backdoor.sha256, "rate": self.rate, "count": self.count, "seed": self.seed}

    @staticmethod
    def from_dict(values: dict[str, Any], backdoor: Backdoor) -> PoisonPlan:
        """Raises `InputError` where the plan was made for another backdoor or is no plan."""
        expected = {"backdoor_sha256", "rate", "count", "seed"}
        if not isinstance(values, dict) or values.keys() != expected:
            raise InputError(f"a poison plan has the keys {', '.join(sorted(expected))}, not {values!r}")
        rate, count, seed = values["rate"], values["count"], values["seed"]
        numbers = type(rate) in (int, float, type(None)) and type(count) in (int, type(None)) and type(seed) is int
        if not numbers:
            raise InputError(f"the poison plan {values!r} has values that are no numbers; write it anew")
        if values["backdoor_sha256"] != backdoor.sha256:
            raise InputError("the poison plan was made for another backdoor; use the backdoor.json that belongs to it")
        return PoisonPlan(backdoor, rate, count, seed)
