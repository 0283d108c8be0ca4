"""Detectors: scores of suspicion for samples. The union is the registry: adding one is a file here and its name in the
union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.detectors.clip_cosine import ClipCosine
from mmbackdoor.detectors.dao import DAO
from mmbackdoor.detectors.k_dist import KDist
from mmbackdoor.detectors.slof import SLOF

Detector = DAO | SLOF | KDist | ClipCosine
DETECTORS = {method.name: method for method in get_args(Detector)}
