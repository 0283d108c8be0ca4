"""The forward pass of all views: open_clip's features, BatchNorm's statistics, one synchronisation."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbackdoor.models.clip import build_tiny_clip, load_clip, save_clip
from mmbackdoor.models.clip_encoder import ViewEncoder, projection_head
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.outputs import ClipOutputs
from mmbackdoor.objectives.siglip import SigLip
from mmbackdoor.shards.shapes import all_scenes, caption

CAPTIONS = [caption(scene) for scene in all_scenes()[:200]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS)


def make(tokenizer, **options):
    clip = build_tiny_clip("clip_tiny_resnet", tokenizer)
    return clip, ViewEncoder(clip.network, **options).train()


def pictures(seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + shift


def statistics(clip) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in clip.network.state_dict().items() if "running" in name}


def test_views_are_encoded_as_open_clip_does(tokenizer):
    clip, encoder = make(tokenizer)
    encoder.eval()
    images = {"image": pictures(0), "image_aug": pictures(1)}
    texts = {"text": clip.tokenize(CAPTIONS[:6]), "text_aug": clip.tokenize(CAPTIONS[6:12])}
    with torch.no_grad():
        outputs = ClipOutputs(*encoder(images, texts))
        for name, values in images.items():
            assert torch.equal(outputs.features[name], clip.network.encode_image(values, normalize=True))
        for name, values in texts.items():
            expected = clip.network.encode_text(values, normalize=True)
            assert torch.allclose(outputs.features[name], expected, atol=1e-6)
    assert outputs.features.keys() == images.keys() | texts.keys()
    assert outputs.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5) and outputs.logit_bias is None
    assert encoder(images, {})[0].keys() == images.keys() and encoder({}, texts)[0].keys() == texts.keys()


def test_separate_views_have_their_own_statistics_and_the_first_moves_the_running_ones(tokenizer):
    alone, encoder = make(tokenizer)
    expected = encoder({"image": pictures(0)}, {})[0]["image"]
    wanted = statistics(alone)
    clip, encoder = make(tokenizer)
    found = encoder({"image": pictures(0), "image_aug": pictures(1, 3.0)}, {})[0]
    assert torch.equal(found["image"], expected)
    assert all(torch.equal(value, wanted[name]) for name, value in statistics(clip).items())
    momenta = {module.momentum for module in clip.network.visual.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert momenta == {0.1}, "and is what it was, afterwards"
    mixed_clip, mixed = make(tokenizer, batch_norm="mixed")
    mixed_features = mixed({"image": pictures(0), "image_aug": pictures(1, 3.0)}, {})[0]
    assert not torch.allclose(mixed_features["image"], expected, atol=1e-3)
    assert any(not torch.allclose(value, wanted[name]) for name, value in statistics(mixed_clip).items())


def test_a_head_is_for_augmented_pictures_and_drawn_from_its_seed(tokenizer):
    head, again, other = (projection_head(64, (32, 32, 16), seed) for seed in (0, 0, 1))
    assert torch.equal(head[0].weight, again[0].weight) and not torch.equal(head[0].weight, other[0].weight)
    clip, encoder = make(tokenizer, projection=head)
    images = {"image": pictures(0), "image_aug": pictures(1), "image_aug2": pictures(2)}
    encoder.eval()
    with torch.no_grad():
        features = encoder(images, {})[0]
        assert features.keys() == {*images, "projection:image_aug", "projection:image_aug2"}
        expected = F.normalize(head(clip.network.encode_image(images["image_aug2"])), dim=-1)
    assert torch.allclose(features["projection:image_aug2"], expected, atol=1e-6)
    assert features["projection:image_aug"].shape == (6, 16)


def test_a_logit_bias_is_learned_kept_and_has_a_gradient_even_where_no_loss_looks_at_it(tokenizer, tmp_path):
    clip = build_tiny_clip("clip_tiny_vit", tokenizer, logit_init=SigLip.logit_init)
    assert clip.network.logit_bias.item() == -10 and clip.network.logit_scale.exp().item() == pytest.approx(10)
    features, scale, bias = ViewEncoder(clip.network)({"image": pictures(0)}, {"text": clip.tokenize(CAPTIONS[:6])})
    assert bias.item() == -10
    (features["image"] @ features["text"].T * scale).sum().backward()
    assert clip.network.logit_bias.grad == 0 and clip.network.logit_scale.grad != 0
    clip.network.logit_bias.data.fill_(-7.5)
    save_clip(clip, tmp_path / "model")
    assert load_clip(str(tmp_path / "model")).network.logit_bias.item() == -7.5
    stock = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    assert stock.logit_bias.item() == -7.5
    plain = build_tiny_clip("clip_tiny_vit", tokenizer)
    save_clip(plain, tmp_path / "plain")
    with_bias = load_clip(str(tmp_path / "plain"), logit_init=SigLip.logit_init)
    assert with_bias.network.logit_bias.item() == 0
    assert with_bias.network.logit_scale.item() == plain.network.logit_scale.item()
