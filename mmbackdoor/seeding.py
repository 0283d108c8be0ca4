"""Randomness that depends on names, never on the order of calls, the rank or a global generator.

Every draw in this project is a pure function of a seed and the names of what it is for, for instance
`torch_generator(seed, "noise", step, index)`: so any number of processes computes what one would, and a resumed run
continues exactly.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose that `names` spell."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def python_rng(seed: int, *names: str | int) -> random.Random:
    return random.Random(derive_seed(seed, *names))


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *names))


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator: draws are the same on every device, and are moved there afterwards."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))


def hash_fraction(seed: int, *names: str | int) -> float:
    """A number in [0, 1) that is uniform over names: the way to pick a share of keys."""
    return derive_seed(seed, *names) / 2**63
