"""Removals of a backdoor from CLIP. The union is the registry: adding one is a file here and its name in the union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.defenses.clip.cleanclip import CleanClip
from mmbackdoor.defenses.clip.distill_anchor import DistillAnchor
from mmbackdoor.defenses.clip.finetune import ClipFinetune
from mmbackdoor.defenses.clip.par import Par
from mmbackdoor.defenses.clip.reset_distill import ResetDistill
from mmbackdoor.defenses.clip.shrink_perturb import ShrinkPerturb
from mmbackdoor.defenses.clip.ssl_only import SslOnly

ClipDefense = CleanClip | ClipFinetune | SslOnly | ShrinkPerturb | Par | DistillAnchor | ResetDistill
CLIP_DEFENSES = {method.name: method for method in get_args(ClipDefense)}
