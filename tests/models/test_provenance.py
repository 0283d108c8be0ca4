"""The records beside a model belong to its weights, and what changed is told by groups."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mmbackdoor.backdoor import Backdoor, BackdoorRecord
from mmbackdoor.models.provenance import (
    check_provenance,
    inherit,
    poisoned_sha256,
    read_removal,
    weight_changes,
    write_removal,
)
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.targets import PatchTarget
from mmbackdoor.triggers import ZeroWidthTrigger
from mmbackdoor.types import InputError

BACKDOOR = Backdoor((ZeroWidthTrigger(),), PatchTarget())


def model(folder, value):
    (folder / "unet").mkdir(parents=True)
    save_file({"weight": torch.full((4,), value)}, folder / "unet/diffusion_pytorch_model.safetensors")
    return weights_sha256(folder)


def test_a_poisoned_model_and_the_one_cleaned_from_it(tmp_path):
    poisoned, cleaned = tmp_path / "poisoned", tmp_path / "cleaned"
    digest = model(poisoned, 1.0)
    model(cleaned, 2.0)
    check_provenance(poisoned)
    for folder in (poisoned, cleaned):
        BackdoorRecord(BACKDOOR, model_sha256=digest).save(folder)
    check_provenance(poisoned)
    with pytest.raises(InputError, match="another model"):
        check_provenance(cleaned)
    write_removal(cleaned, {"parent_sha256": digest, "weights": {}})
    check_provenance(cleaned)
    write_removal(cleaned, {"parent_sha256": "0" * 64, "weights": {}})
    with pytest.raises(InputError, match="force_trigger"):
        check_provenance(cleaned)


def test_a_model_cleaned_twice_still_names_the_one_that_was_poisoned(tmp_path):
    assert poisoned_sha256(tmp_path) is None
    folders = [tmp_path / name for name in ("poisoned", "once", "twice")]
    digests = [model(folder, float(number)) for number, folder in enumerate(folders)]
    for folder in folders:
        BackdoorRecord(BACKDOOR, model_sha256=digests[0]).save(folder)
    for before, after, digest in zip(folders, folders[1:], digests, strict=False):
        write_removal(after, {"parent_sha256": digest, "poisoned_sha256": poisoned_sha256(before)})
        check_provenance(after)
        assert poisoned_sha256(after) == digests[0]


def test_a_fine_tuned_model_has_the_stage_and_the_backdoor_of_its_parent(tmp_path):
    parent, poisoned, cleaned = (tmp_path / name for name in ("parent", "poisoned", "cleaned"))
    model(poisoned, 2.0), model(cleaned, 2.0)
    digest = model(parent, 1.0)
    assert inherit(None, poisoned) == inherit(parent, poisoned) == ("clean", None)
    assert not (poisoned / "backdoor.json").exists()
    record = BackdoorRecord(BACKDOOR, {"name": "badt2i_pixel"}, {"rate": 0.1}, parent_sha256="1", model_sha256=digest)
    record.save(parent)
    assert inherit(parent, poisoned) == ("poisoned", BACKDOOR)
    check_provenance(poisoned)
    assert BackdoorRecord.load(poisoned) == replace(record, model_sha256=weights_sha256(poisoned))
    write_removal(parent, {"parent_sha256": "2", "poisoned_sha256": digest})
    assert inherit(parent, cleaned) == ("cleaned", BACKDOOR)
    check_provenance(cleaned)
    (parent / "backdoor.json").unlink()
    (tmp_path / "unnamed").mkdir()
    assert inherit(parent, tmp_path / "unnamed") == ("cleaned", None)
    for folder in (cleaned, tmp_path / "unnamed"):
        assert (folder / "removal.json").read_bytes() == (parent / "removal.json").read_bytes()


def test_a_removal_that_is_none_is_refused(tmp_path):
    assert read_removal(tmp_path) is None
    (tmp_path / "removal.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        read_removal(tmp_path)
    (tmp_path / "removal.json").write_text(json.dumps({"schema": 7}))
    with pytest.raises(InputError, match="schema"):
        read_removal(tmp_path)


def test_changes_are_told_by_block_and_layer():
    before = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(4),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight": torch.ones(4),
        "mid_block.resnets.0.conv1.weight": torch.ones(4),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] *= 1.5
    changes = weight_changes(before, after)
    assert changes["down_blocks.0 attn2.to_k"] == {"relative_change": pytest.approx(0.5), "parameters": 4}
    assert changes["down_blocks.0 attn2"]["relative_change"] == 0
    assert changes["mid_block resnets"]["relative_change"] == 0
