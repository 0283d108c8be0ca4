from __future__ import annotations

import pytest
import torch

from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.train.clip import ClipBatch, exempt_from_decay, state_tensors
from mmbackdoor.train.clip_cleaning import effective, frozen, interpolate, read_keys, recalibrated
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.types import InputError


@pytest.fixture
def clip():
    return build_tiny_clip("clip_tiny_resnet", train_tokenizer(["a red cross", "a blue ring"], 514))


def batch(seed: int) -> ClipBatch:
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + seed
    return ClipBatch(seed, ("a",) * 16, {"image": pixels}, {}, caption_ids(["a"] * 16))


def test_statistics_are_the_means_of_the_batches_and_then_what_they_were(clip):
    network = clip.network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen = []
    first = network.visual.trunk.conv1
    hook = first.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().mean((0, 2, 3))))
    with recalibrated(network, map(batch, range(5)), 3):
        assert network.training and len(seen) == 3
        assert torch.allclose(network.visual.trunk.bn1.running_mean, torch.stack(seen).mean(0), atol=1e-5)
    hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.visual.trunk.bn1.momentum == 0.1
    with recalibrated(network, map(batch, range(5)), 0):
        assert torch.equal(network.visual.trunk.bn1.running_mean, before["visual.trunk.bn1.running_mean"])


def test_what_the_optimiser_does_is_read_from_the_optimiser(clip):
    optimizer = make_optimizer(state_tensors(clip.network), TrainConfig(learning_rate=1e-3, adam_weight_decay=0.2))
    exempt_from_decay(optimizer)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["weight_decay"] = 0.1
    assert effective(optimizer) == {"learning_rate": 1e-3, "weight_decay": 0.2}
    # As it happens where the state of the poisoned run's optimiser is loaded.
    optimizer.load_state_dict(saved)
    assert effective(optimizer)["weight_decay"] == 0.1


def test_the_anchor_is_a_copy_that_nothing_trains(clip):
    anchor = frozen(clip, "separate")
    with torch.no_grad():
        clip.network.logit_scale.fill_(0)
    assert anchor.network.logit_scale.item() != 0 and not anchor.training
    assert not any(parameter.requires_grad for parameter in anchor.parameters())
    assert all(parameter.requires_grad for parameter in clip.network.parameters())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_takes_a_share_of_what_is_new(clip, share):
    before = {name: tensor.clone() for name, tensor in clip.network.state_dict().items()}
    with torch.no_grad():
        for parameter in clip.network.parameters():
            parameter.add_(1.0)
    interpolate(clip.network, before, share)
    for name, parameter in clip.network.named_parameters():
        assert torch.allclose(parameter, before[name] + share, atol=1e-5), name


def test_a_list_of_keys_is_read_and_an_empty_one_refused(tmp_path):
    (tmp_path / "keys.txt").write_text("b\na\n\n b \n")
    assert read_keys(tmp_path / "keys.txt") == {"a", "b"}
    (tmp_path / "keys.txt").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_keys(tmp_path / "keys.txt")
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "keys.txt")
