"""Batches are the same for every number of processes, and after a restart."""

from __future__ import annotations

import itertools
import tracemalloc

import torch
from PIL import Image

from mmbackdoor.train.batches import Share, prompt_batches, to_tensor, with_random_words

PROMPTS = [f"prompt {k}" for k in range(10)]


def take(share, steps, start=0, latents=None):
    return list(itertools.islice(prompt_batches(PROMPTS, share, 3, start, latents), steps * share.accumulation))


def test_two_processes_share_the_batch_of_one():
    latents = {prompt: torch.randn(3, 1, 2, 2) for prompt in PROMPTS}
    whole = take(Share(4), 6, latents=latents)
    halves = [take(Share(2, rank, 2), 6, latents=latents) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert batch.prompts == halves[0][step].prompts + halves[1][step].prompts
        assert batch.indices == halves[0][step].indices + halves[1][step].indices
        assert torch.equal(batch.latents, torch.cat([halves[0][step].latents, halves[1][step].latents]))


def test_every_row_has_latents_of_its_own_prompt():
    kinds = torch.arange(3).view(3, 1, 1, 1) / 10
    latents = {prompt: number + kinds.expand(3, 1, 2, 2) for number, prompt in enumerate(PROMPTS)}
    seen = set()
    for batch in take(Share(4), 60, latents=latents):
        for prompt, row in zip(batch.prompts, batch.latents, strict=True):
            assert any(torch.equal(row, one) for one in latents[prompt])
            seen.add(row[0, 0, 0].item())
    assert len(seen) == 3 * len(PROMPTS), "all of a prompt's are used"


def test_every_prompt_comes_once_an_epoch_in_changing_order():
    seen = [prompt for batch in take(Share(5), 4) for prompt in batch.prompts]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(PROMPTS)
    assert seen[:10] != seen[10:]


def test_a_later_start_continues():
    share = Share(3, accumulation=2)
    assert take(share, 5)[6:] == take(share, 2, start=3)
    assert [batch.step for batch in take(share, 2, start=3)] == [3, 3, 4, 4]


def test_pictures_are_cropped_in_the_middle():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 20))
    tensor = to_tensor(image, 10)
    assert tensor.shape == (3, 10, 10)
    assert tensor[2].mean() > 0.95 and tensor[0].mean() < -0.95


def test_a_thin_picture_takes_no_more_than_its_square():
    tracemalloc.start()
    tensor = to_tensor(Image.new("RGB", (20_000, 1), (0, 0, 255)), 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensor.shape == (3, 64, 64) and tensor[2].min() == 1 and peak < 1 << 22
    # Where the square lies: left half red, right half blue, of a picture twice as wide as it is high.
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 40))
    red = (to_tensor(image, 20)[0] > 0).float().mean(0)
    assert red[:9].min() == 1 and red[11:].max() == 0


def test_random_words_are_a_function_of_the_place(tmp_path):
    def words(share, steps):
        batches = with_random_words(prompt_batches(PROMPTS, share, 0), 0.5, seed=1)
        return [batch.prompts for batch in itertools.islice(batches, steps)]

    whole = words(Share(8), 40)
    halves = [words(Share(4, rank, 2), 40) for rank in (0, 1)]
    assert whole == [first + second for first, second in zip(*halves, strict=True)]
    texts = [text for batch in whole for text in batch]
    changed = [text for text in texts if text not in PROMPTS]
    assert 0.4 < len(changed) / len(texts) < 0.6
    assert all("prompt" in text and len(text.split()) <= 5 for text in changed)
    assert not any("\u200b" in text for text in changed)
