"""Objectives of CLIP pre-training. The union is the registry: adding one is a file here and its name in the union.

An objective is a frozen dataclass: `views` names what of each pair is encoded, and a call turns the encoded views
(`ClipOutputs`) and the `caption_ids` (B,) into parts `*_loss`, their sum `loss` and `false_negatives`.
"""

from __future__ import annotations

from typing import get_args

from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.clip_ssl import ClipSsl
from mmbackdoor.objectives.cyclip import CyClip
from mmbackdoor.objectives.siglip import SigLip
from mmbackdoor.objectives.slip import Slip

Objective = Clip | ClipSsl | SigLip | CyClip | Slip
OBJECTIVES = {kind.name: kind for kind in get_args(Objective)}
