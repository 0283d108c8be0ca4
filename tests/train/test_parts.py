"""What a method keeps on the device, and what only the record at the end needs."""

from __future__ import annotations

import pytest
import torch

from mmbackdoor.defenses import SKD, Finetune, FinetuneReversal
from mmbackdoor.defenses.finetune_reversal import Reference
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.train import parts
from mmbackdoor.train.plan import size


class OnADevice:
    """Stands for a tensor on another device, whose copies would take its memory."""

    def detach(self) -> OnADevice:
        return self

    def clone(self) -> None:
        raise AssertionError("a copy stays on the device")

    def to(self, device: str, copy: bool) -> tuple[str, bool]:
        return device, copy


def test_the_record_s_copies_are_on_the_cpu(monkeypatch):
    model = load(shipped("tiny"))
    monkeypatch.setattr(parts, "trained_tensors", lambda model: {"weight": OnADevice()})
    assert parts.trained_part(model, SKD(), 4, False, 0).before == {"weight": ("cpu", True)}


def test_they_do_not_follow_the_training():
    model = load(shipped("tiny"))
    part = parts.trained_part(model, SKD(), 4, False, 0)
    kept = {name: value.clone() for name, value in part.before.items()}
    with torch.no_grad():
        for parameter in part.parameters.values():
            parameter += 1
    assert kept and all(torch.equal(kept[name], value) for name, value in part.before.items())


def test_fine_tuning_has_no_teacher_in_memory():
    part = parts.trained_part(load(shipped("tiny")), Finetune(), 4, False, 0)
    assert list(part.held) == ["text encoder and autoencoder"]
    assert part.setting(part.module, None).teacher is None


@pytest.mark.parametrize("reversal", [False, True])
def test_the_estimate_counts_a_clean_reference_whole_and_no_teacher_beside_it(reversal):
    model = load(shipped("tiny"))
    defense = FinetuneReversal(reference="tiny") if reversal else SKD()
    reference = Reference(load(shipped("tiny"))) if reversal else None
    part = parts.trained_part(model, defense, 4, False, 0, reference)
    held = {name: size(tensors) for name, tensors in part.held.items()}
    if reversal:
        pipe = reference.model.pipe
        modules = [pipe.unet, pipe.vae, pipe.text_encoder]
        assert held["the clean reference"] == sum(size([*one.parameters(), *one.buffers()]) for one in modules)
    else:
        assert held["tensors of the teacher"] == size(part.parameters.values()) > 0
    assert len(held) == 2
