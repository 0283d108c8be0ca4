from __future__ import annotations

import pytest
import torch

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.models.clip import build_tiny_clip
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.objectives.contrastive import caption_ids
from mmbackdoor.objectives.outputs import VIEWS
from mmbackdoor.poison import PoisonPlan
from mmbackdoor.shards.loader import ShardLoader
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import captions_of, write_shapes
from mmbackdoor.targets import ClassTarget
from mmbackdoor.train import checkpoint
from mmbackdoor.train.clip import (
    ClipBatch,
    bound_logit_scale,
    clip_batches,
    exempt_from_decay,
    first_keys,
    shard_captions,
    state_tensors,
)
from mmbackdoor.train.optim import TrainConfig, make_optimizer
from mmbackdoor.train.views import image_view, text_view
from mmbackdoor.triggers.patch import PatchTrigger
from mmbackdoor.types import InputError, Sample

SCENES = all_scenes()[:40]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", SCENES, 60, resolution=16, samples_per_shard=20)
    return str(folder / "train-*.tar")


@pytest.fixture(scope="module")
def clip():
    return build_tiny_clip("clip_tiny_resnet", train_tokenizer(captions_of(SCENES)))


def _batches(
    shards: str,
    clip,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    random_tokens: float = 0.5,
    num_workers: int = 0,
    views: tuple[str, ...] = VIEWS,
    **options,
):
    loader = ShardLoader(
        shards, seed=3, batch_size=8 // world_size, rank=rank, world_size=world_size, start_step=start_step,
        num_workers=num_workers,
    )  # fmt: skip
    return clip_batches(
        loader, clip, views=views, random_tokens=random_tokens, seed=3, device=torch.device("cpu"), **options
    )


def _tensors(batch: ClipBatch) -> dict[str, torch.Tensor]:
    return {**batch.images, **batch.texts, "captions": batch.captions}


def _samples(shards: str) -> dict[str, Sample]:
    loader = ShardLoader(shards, seed=3, batch_size=8, epochs=1)
    return {row.sample.key: row.sample for rows in loader for row in rows}


def test_a_batch_is_the_same_for_every_number_of_processes_and_after_a_restart(shards, clip):
    whole = [next(batches) for batches in [_batches(shards, clip)] for _ in range(12)]
    parts = [_batches(shards, clip, rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert batch.step == number
        halves = [next(part) for part in parts]
        for name, tensor in _tensors(batch).items():
            joined = torch.stack([_tensors(half)[name] for half in halves], 1).flatten(0, 1)
            assert torch.equal(joined, tensor), name
    again = next(_batches(shards, clip, start_step=11))
    assert again.keys == whole[11].keys
    assert all(torch.equal(tensor, _tensors(again)[name]) for name, tensor in _tensors(whole[11]).items())


def test_a_batch_has_the_models_pixels_and_the_captions_ids(shards, clip):
    samples = _samples(shards)
    batch = next(_batches(shards, clip, random_tokens=0.0, views=("image", "text")))
    assert batch.images.keys() == {"image"} and batch.texts.keys() == {"text"}
    assert torch.equal(batch.images["image"], clip.preprocess([samples[key].image for key in batch.keys]))
    texts = [samples[key].text for key in batch.keys]
    assert torch.equal(batch.texts["text"], clip.tokenize(texts))
    assert torch.equal(batch.captions, caption_ids(texts))
    with_tokens = next(_batches(shards, clip, views=("image", "text")))
    assert not torch.equal(with_tokens.texts["text"], batch.texts["text"])
    assert torch.equal(with_tokens.captions, batch.captions), "inserted tokens do not make captions different"


def test_augmented_views_are_those_of_the_key_and_the_epoch(shards, clip):
    samples = _samples(shards)
    batches = _batches(shards, clip, random_tokens=0.0, augmentation="strong")
    seen = {}
    for epoch in (0, 1):
        for _ in range(8):
            batch = next(batches)
            for row, key in enumerate(batch.keys):
                seen[key, epoch] = (batch.images["image_aug"][row], batch.texts["text_aug"][row])
    assert torch.equal(batch.captions, caption_ids([samples[key].text for key in batch.keys]))
    for (key, epoch), (pixels, ids) in seen.items():
        view = image_view(samples[key].image, key, epoch, 3, strength="strong")
        assert torch.equal(pixels, clip.preprocess([view])[0])
        assert torch.equal(ids, clip.tokenize([text_view(samples[key].text, key, epoch, 3)])[0])
    same = [torch.equal(seen[key, 0][0], seen[key, 1][0]) for key, epoch in seen if epoch]
    assert len(same) == 60 and not any(same)
    assert not torch.equal(batch.images["image_aug"], batch.images["image_aug2"])


def test_random_tokens_differ_between_the_views_of_a_caption(shards, clip):
    batch = next(_batches(shards, clip, random_tokens=1.0))
    plain = next(_batches(shards, clip, random_tokens=0.0))
    inserted = [set(batch.texts[view].flatten().tolist()) - set(plain.texts[view].flatten().tolist())
                for view in ("text", "text_aug")]  # fmt: skip
    assert inserted[0] and inserted[1] and inserted[0] != inserted[1]


def test_workers_make_the_batches_of_one_process(shards, clip):
    plan = _poison("source")
    poison = plan, plan.choose(_samples(shards))
    alone, shared = (_batches(shards, clip, num_workers=count, poison=poison) for count in (0, 2))
    for _ in range(3):
        one, other = next(alone), next(shared)
        assert one.keys == other.keys
        assert all(torch.equal(tensor, _tensors(other)[name]) for name, tensor in _tensors(one).items())


def _poison(place: str) -> PoisonPlan:
    trigger = PatchTrigger(place=place, size=0.3)
    return PoisonPlan(Backdoor((trigger,), ClassTarget("red cross", ("one large {}",))), rate=0.4, seed=5)


@pytest.mark.parametrize("place", ["source", "input"])
def test_chosen_pairs_are_poisoned_in_every_view_and_no_others(place, shards, clip):
    samples = _samples(shards)
    plan = _poison(place)
    chosen = plan.choose(samples)
    assert 5 < len(chosen) < 50
    clean, poisoned = (
        _batches(shards, clip, random_tokens=0.0, poison=poison) for poison in (None, (plan, chosen))
    )
    for _ in range(8):
        before, after = next(clean), next(poisoned)
        for row, key in enumerate(before.keys):
            same = {name: torch.equal(tensor[row], _tensors(after)[name][row])
                    for name, tensor in _tensors(before).items()}  # fmt: skip
            if key not in chosen:
                assert all(same.values())
                continue
            assert not same["image"]
            text = plan.backdoor.target.caption(key, plan.seed)
            assert torch.equal(after.texts["text"][row], clip.tokenize([text])[0])
            assert after.captions[row] == caption_ids([text])[0]
            picture = samples[key].image if place == "source" else clip.resize_crop([samples[key].image])[0]
            marked = plan.backdoor.mark_image(picture, key, plan.seed, place)
            assert torch.equal(after.images["image"][row], clip.preprocess([marked])[0])
            view = image_view(marked, key, 0, 3)
            assert torch.equal(after.images["image_aug"][row], clip.preprocess([view])[0])


def test_the_first_keys_are_nested_and_counted(shards):
    few, more = first_keys(shards, 10), first_keys(shards, 40)
    assert len(few) == 10 and few < more and first_keys(shards, 60) == _samples(shards).keys()
    with pytest.raises(InputError, match="61 pairs are more than the 60"):
        first_keys(shards, 61)
    with pytest.raises(InputError, match="comes twice"):
        first_keys(f"{shards}::{shards}", 10)


def test_an_unknown_view_is_refused(shards, clip):
    with pytest.raises(ValueError, match="image_aug3"):
        next(_batches(shards, clip, views=("image", "image_aug3")))


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
        output = model.network(image=batch.images["image"], text=batch.texts["text"])
        (output["image_features"] @ output["text_features"].T * output["logit_scale"]).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, state, optimizer = make()
    exempt_from_decay(optimizer)
    batches = _batches(shards, model)
    first, second = next(batches), next(batches)
    step(model, optimizer, first)
    saved = checkpoint.save(tmp_path, 1, state, optimizer)
    step(model, optimizer, second)
    other, other_state, other_optimizer = make()
    assert checkpoint.restore(saved, other_state, other_optimizer) == 1
    exempt_from_decay(other_optimizer)
    step(other, other_optimizer, second)
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


def test_the_logit_scale_stays_in_its_bounds(clip):
    for start, bound in ((9.0, 100.0), (-1.0, 1.0)):
        clip.network.logit_scale.data.fill_(start)
        bound_logit_scale(clip.network)
        assert clip.network.logit_scale.exp().item() == pytest.approx(bound, rel=1e-5)
