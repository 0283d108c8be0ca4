"""Objectives of CLIP pre-training. The union is the registry: adding one is a file here and its name in the union."""

from __future__ import annotations

from mmbackdoor.objectives.clip import Clip

Objective = Clip
OBJECTIVES = {Clip.name: Clip}
