from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import captions_of, write_shapes
from mmbackdoor.train import checkpoint
from mmbackdoor.train.clip import (
    bound_logit_scale,
    clip_batches,
    exempt_from_decay,
    shard_captions,
    state_tensors,
)
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.types import InputError

SCENES = all_scenes()[:40]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", SCENES, 60, resolution=16, samples_per_shard=20)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def clip():
    return build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(SCENES)))


def _batches(shards: str, clip, rank: int = 0, world_size: int = 1, start_step: int = 0, random_tokens: float = 0.5):
    loader = ShardLoader(
        shards, seed=3, batch_size=8 // world_size, rank=rank, world_size=world_size, start_step=start_step
    )
    return clip_batches(loader, clip, random_tokens=random_tokens, seed=3, device=torch.device("cpu"))


def test_a_batch_is_the_same_for_every_number_of_processes_and_after_a_restart(shards, clip):
    whole = [next(batches) for batches in [_batches(shards, clip)] for _ in range(12)]
    parts = [_batches(shards, clip, rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert batch.step == number
        halves = [next(part) for part in parts]
        for name in ("pixels", "ids", "captions"):
            joined = torch.stack([getattr(half, name) for half in halves], 1).flatten(0, 1)
            assert torch.equal(joined, getattr(batch, name))
    again = next(_batches(shards, clip, start_step=11))
    assert again.keys == whole[11].keys and torch.equal(again.ids, whole[11].ids)


def test_a_batch_has_the_models_pixels_and_the_captions_ids(shards, clip):
    entries = {row.sample.key: row.sample for row in next(iter(ShardLoader(shards, seed=3, batch_size=8)))}
    batch = next(_batches(shards, clip, random_tokens=0.0))
    assert batch.pixels.shape == (8, 3, 32, 32) and batch.pixels.min() >= -1.2 and batch.pixels.max() <= 1.2
    texts = [entries[key].text for key in batch.keys]
    assert torch.equal(batch.ids, clip.tokenize(texts)) and torch.equal(batch.captions, caption_ids(texts))
    with_tokens = next(_batches(shards, clip))
    assert not torch.equal(with_tokens.ids, batch.ids)
    assert torch.equal(with_tokens.captions, batch.captions), "inserted tokens do not make captions different"


def test_captions_are_read_without_pictures(shards, tmp_path):
    captions = shard_captions(shards)
    assert len(captions) == 60 and set(captions) <= set(captions_of(SCENES))
    assert shard_captions(shards, limit=5) == captions[:5]
    with pytest.raises(InputError):
        shard_captions(str(tmp_path / "none.tar"))


def test_gains_biases_and_statistics_do_not_decay(clip):
    state = state_tensors(clip.network)
    assert state.keys() == clip.network.state_dict().keys()
    assert any("running_mean" in name for name in state)
    optimizer = make_optimizer(state, TrainConfig(adam_weight_decay=0.3))
    exempt_from_decay(optimizer)
    decayed, exempt = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and exempt["weight_decay"] == 0.0
    names = {id(tensor): name for name, tensor in state.items()}
    assert "token_embedding.weight" in {names[id(tensor)] for tensor in decayed["params"]}
    left = {names[id(tensor)] for tensor in exempt["params"]}
    assert {"logit_scale", "ln_final.weight", "ln_final.bias"} <= left
    assert [names[id(t)] for group in optimizer.param_groups for t in group["params"]] == list(state)


def test_a_checkpoint_brings_moments_and_statistics_back_to_their_tensors(shards, tmp_path):
    def make():
        model = build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(SCENES)))
        state = state_tensors(model.network.train())
        return model, state, make_optimizer(state, TrainConfig(learning_rate=1e-2))

    def step(model, optimizer, batch):
        output = model.network(image=batch.pixels, text=batch.ids)
        (output["image_features"] @ output["text_features"].T * output["logit_scale"]).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, state, optimizer = make()
    exempt_from_decay(optimizer)
    batches = _batches(shards, model)
    first, second = next(batches), next(batches)
    step(model, optimizer, first)
    saved = checkpoint.save(tmp_path, 1, state, optimizer, "x")
    step(model, optimizer, second)
    other, other_state, other_optimizer = make()
    assert checkpoint.restore(saved, other_state, other_optimizer, "x") == 1
    exempt_from_decay(other_optimizer)
    step(other, other_optimizer, second)
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


def test_the_logit_scale_stays_in_its_bounds(clip):
    for start, bound in ((9.0, 100.0), (-1.0, 1.0)):
        clip.network.logit_scale.data.fill_(start)
        bound_logit_scale(clip.network)
        assert clip.network.logit_scale.exp().item() == pytest.approx(bound, rel=1e-5)
