"""Attacks, to make testbeds. The union is the registry: adding one is a file here and its name in this union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.attacks.badt2i_object import BadT2IObject
from mmbackdoor.attacks.badt2i_pixel import BadT2IPixel
from mmbackdoor.attacks.badt2i_style import BadT2IStyle
from mmbackdoor.attacks.evil_edit import EvilEdit
from mmbackdoor.attacks.rickrolling_tpa import RickrollingTPA

DiffusionAttack = BadT2IPixel | BadT2IStyle | BadT2IObject | EvilEdit | RickrollingTPA
ATTACKS = {method.name: method for method in get_args(DiffusionAttack)}
