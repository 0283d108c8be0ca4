"""Defenses: removals of a backdoor. The union is the registry: adding one is a file here and its name in the union."""

from __future__ import annotations

from typing import get_args

from mmbackdoor.defenses.closed_form_seal import ClosedFormSeal
from mmbackdoor.defenses.esd import ESD
from mmbackdoor.defenses.finetune import Finetune
from mmbackdoor.defenses.finetune_reversal import FinetuneReversal
from mmbackdoor.defenses.skd import SKD
from mmbackdoor.defenses.skd_cag import SKDCAG
from mmbackdoor.defenses.text_encoder_seal import TextEncoderSeal

DiffusionDefense = SKDCAG | SKD | Finetune | FinetuneReversal | ESD | ClosedFormSeal | TextEncoderSeal
DEFENSES = {method.name: method for method in get_args(DiffusionDefense)}
