from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing, nn

from mmbackdoor.objectives.clip import Clip
from mmbackdoor.objectives.contrastive import caption_ids, clip_loss

WORDS = ["red cross", "blue ring", "red cross", "star", "heart", "blue ring", "blue ring", "square"]
MODES = ("plain", "mask", "soft")


def _features(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64).unbind()
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_without_equal_captions_every_way_is_open_clips_loss():
    image, text = (values.float() for values in _features())
    expected = open_clip.ClipLoss()(image, text, torch.tensor(7.0))
    for mode in MODES:
        losses = clip_loss(image, text, torch.tensor(7.0), torch.arange(8), equal_captions=mode)
        assert torch.allclose(losses["loss"], expected) and losses["loss"] is losses["clip_loss"]
        assert losses["false_negatives"] == 0
    plain = clip_loss(image, text, torch.tensor(7.0), caption_ids(WORDS), equal_captions="plain")
    assert torch.allclose(plain["loss"], expected)


@pytest.mark.parametrize("mode", MODES)
def test_equal_captions_are_taken_as_said(mode):
    image, text = (values.float() for values in _features())
    scale = 5.0
    total = 0.0
    for logits in (scale * image @ text.T, scale * text @ image.T):
        for row in range(8):
            same = [k for k in range(8) if WORDS[k] == WORDS[row]]
            rest = [k for k in range(8) if k not in same]
            counted = {"plain": range(8), "mask": [row, *rest], "soft": range(8)}[mode]
            wanted = same if mode == "soft" else [row]
            log_sum = math.log(sum(math.exp(logits[row, k]) for k in counted))
            total -= sum(float(logits[row, k]) - log_sum for k in wanted) / len(wanted)
    losses = clip_loss(image, text, torch.tensor(scale), caption_ids(WORDS), equal_captions=mode)
    assert losses["loss"].item() == pytest.approx(total / 16, abs=1e-5)
    assert losses["false_negatives"].item() == pytest.approx((2 + 6) / 56)


def test_equal_captions_with_equal_features_pull_apart_only_where_plain():
    """Two pairs with one caption have one text: no gradient can tell them apart, and none should try."""
    image, text = (values.float()[:2] for values in _features())
    text = text[:1].expand(2, -1)
    scale, ids = torch.tensor(9.0), torch.tensor([5, 5])
    perfect = {mode: clip_loss(text, text, scale, ids, equal_captions=mode)["loss"] for mode in MODES}
    assert perfect["mask"] == 0
    assert perfect["plain"].item() == pytest.approx(math.log(2), abs=1e-5)
    image = image.clone().requires_grad_()
    clip_loss(image, text, scale, ids, equal_captions="mask")["loss"].backward()
    assert image.grad.abs().max() == 0


def test_logits_are_in_full_precision_under_autocast():
    image, text = (values.float() for values in _features())
    expected = clip_loss(image, text, torch.tensor(100.0), torch.arange(8))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(image, text, torch.tensor(100.0), torch.arange(8))["loss"], expected)


def test_caption_ids_are_equal_for_equal_captions_only():
    ids = caption_ids([*WORDS, "\udcff"])
    assert (ids[:8, None] == ids[None, :8]).tolist() == [[a == b for b in WORDS] for a in WORDS]
    assert caption_ids(["star"]) == ids[3]


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(16, 6, generator=generator))
        self.text = nn.Parameter(torch.randn(16, 6, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(image @ self.image, dim=-1), F.normalize(text @ self.text, dim=-1), self.logit_scale.exp()


def _gradients(towers: nn.Module, mode: str, rows: slice, rank: int, world_size: int) -> tuple[list[Tensor], Tensor]:
    image, text = (values.float() for values in _features(3))
    *features, scale = towers(image[rows], text[rows])
    losses = clip_loss(
        *features, scale, caption_ids(WORDS)[rows], equal_captions=mode, rank=rank, world_size=world_size
    )
    towers.zero_grad()
    losses["loss"].backward()
    return [parameter.grad.clone() for parameter in towers.parameters()], torch.stack(
        [losses["loss"].detach(), losses["false_negatives"]]
    )


def _process(rank: int, rendezvous: str, answers: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    towers = nn.parallel.DistributedDataParallel(_Towers())
    found = {mode: _gradients(towers, mode, slice(4 * rank, 4 * rank + 4), rank, 2) for mode in MODES}
    torch.save(found, f"{answers}{rank}")
    distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path / "meet"), str(tmp_path / "answer")), nprocs=2)
    answers = [torch.load(tmp_path / f"answer{rank}") for rank in range(2)]
    for mode in MODES:
        expected, values = _gradients(_Towers(), mode, slice(None), 0, 1)
        for rank in range(2):
            for ours, whole in zip(answers[rank][mode][0], expected, strict=True):
                assert whole.abs().max() > 1e-3
                assert torch.allclose(ours, whole, atol=1e-6), mode
        assert torch.allclose((answers[0][mode][1] + answers[1][mode][1]) / 2, values, atol=1e-6)


def test_the_objective_declares_its_views_and_hands_its_choice_on():
    image, text = (values.float() for values in _features())
    features = {"image": image, "text": text}
    ids = caption_ids(WORDS)
    assert Clip.views == ("image", "text")
    for mode in MODES:
        losses = Clip(equal_captions=mode)(features, torch.tensor(3.0), ids)
        assert torch.equal(losses["loss"], clip_loss(image, text, torch.tensor(3.0), ids, equal_captions=mode)["loss"])
