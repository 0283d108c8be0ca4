"""The teacher's pictures belong to their prompts, however they are batched."""

from __future__ import annotations

import hashlib

import pytest
import torch
from accelerate import Accelerator

from mmbackdoor.evaluate.generate import Job, Sampling, sample_latents
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.models.source import shipped
from mmbackdoor.train import latents
from mmbackdoor.train.latents import teacher_latents

PROMPTS = ("a large red cross on a blue background", "a small pink ring on a green background", "a big blue square")
SAMPLING = Sampling(num_inference_steps=2, guidance_scale=2.0)


def test_latents_are_those_of_their_prompt(tmp_path, monkeypatch):
    """Two of each prompt in batches of three: the second prompt's lie in both files."""
    model = load(shipped("tiny"))
    arguments = (model, PROMPTS, 2, SAMPLING, tmp_path / "latents", Accelerator(cpu=True), 3)
    found = teacher_latents(*arguments)
    assert list(found) == list(PROMPTS) and len(list((tmp_path / "latents").iterdir())) == 2
    rows = []
    for prompt in PROMPTS:
        name = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        for index in range(2):
            rows.append(found[prompt][index])
            alone = sample_latents(model, [Job(name, "teacher", prompt, index)], SAMPLING)[0]
            torch.testing.assert_close(found[prompt][index], alone, rtol=1e-3, atol=1e-3)
    apart = torch.cdist(torch.stack(rows).flatten(1), torch.stack(rows).flatten(1)) + 1e9 * torch.eye(6)
    assert apart.min() > 1

    def never(*_: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(latents, "sample_latents", never)
    again = teacher_latents(*arguments)
    assert all(torch.equal(again[prompt], found[prompt]) for prompt in PROMPTS)
    with pytest.raises(AssertionError, match="sampled again"):
        teacher_latents(model, PROMPTS[:2], *arguments[2:])
