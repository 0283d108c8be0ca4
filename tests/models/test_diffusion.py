from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.models.diffusion import Conditioning, DiffusionModel, carrying, check_trigger
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.targets import UnknownTarget
from mmbackdoor.triggers import TEXT_TRIGGERS, guess_kind
from mmbackdoor.types import InputError

PROMPTS = ["a photo of a red square", "a blue circle"]


def stock_calls(pipe, guidance: float, latents: torch.Tensor) -> list[dict]:
    """What the stock pipeline's UNet receives and returns in a one-step call."""
    calls = []

    def hook(_module, positional, named, output) -> None:
        calls.append({"sample": positional[0], "t": positional[1], **named, "output": output[0]})

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, num_inference_steps=1, guidance_scale=guidance, latents=latents, output_type="latent")
    handle.remove()
    return calls


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sdxl-empty"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_unet_gets_what_the_stock_pipeline_gives_it(folders, family, guidance):
    model = load(folders(family))
    stock = DiffusionPipeline.from_pretrained(folders(family))
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    (call,) = stock_calls(stock, guidance, latents)
    conditioning = model.encode(PROMPTS)
    if guidance > 1:
        conditioning = Conditioning.cat([model.unconditional(2), conditioning])
    torch.testing.assert_close(call["encoder_hidden_states"], conditioning.hidden_states, rtol=0, atol=1e-6)
    assert set(call["added_cond_kwargs"] or {}) == set(conditioning.added)
    for name, value in conditioning.added.items():
        torch.testing.assert_close(call["added_cond_kwargs"][name], value, rtol=0, atol=1e-6)
    with torch.no_grad():
        timesteps = call["t"].expand(len(conditioning)).long()
        output = model.predict(model.unet, call["sample"], timesteps, conditioning)
    torch.testing.assert_close(output, call["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "with a mask", "an inversion of two vectors"])
def test_text_is_read_as_the_stock_pipeline_reads_it(folders, case):
    pipe = DiffusionPipeline.from_pretrained(folders("sd"))
    prompts = ["", "red " * 40, "a <strange> square"]
    before = DiffusionModel(pipe).encode(prompts).hidden_states
    if case == "with a mask":
        pipe.text_encoder.config.use_attention_mask = True
    elif case != "plain":
        width = pipe.text_encoder.config.hidden_size
        vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
        pipe.load_textual_inversion(vectors, token="<strange>")
    expected, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    found = DiffusionModel(pipe).encode(prompts).hidden_states
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found, before) == (case == "plain")


def test_encode_is_cached_by_prompt_and_keeps_order(folders):
    model = load(folders("sd"))
    both = model.encode(PROMPTS)
    calls = []
    model.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    again = model.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert not calls
    assert torch.equal(again.hidden_states, both.index([1, 0, 1]).hidden_states)
    assert not again.hidden_states.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.encode(["unseen before"]).hidden_states.dtype == torch.float32
    assert calls


def test_token_ids_are_padded_and_truncated(folders):
    model = load(folders("sd"))
    ids = model.token_ids(["red", "red " * 40])
    assert ids.shape == (2, model.max_length) == (2, 16)
    assert ids[0, 0] == model.tokenizer.bos_token_id
    assert ids[1, -1] == model.tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_latents_and_images_as_in_the_stock_pipeline(folders, family):
    model = load(folders(family))
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    assert torch.equal(model.decode(latents), stock)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    posterior = model.vae.encode(image).latent_dist
    expected = posterior.mode() * model.vae.config.scaling_factor
    torch.testing.assert_close(model.encode_images(image), expected)
    draws = [model.encode_images(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_float16_autoencoder_that_overflows_works_in_float32(folders):
    model = load(folders("sdxl"), dtype=torch.float16)
    assert model.vae.config.force_upcast
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    image = model.decode(latents)
    assert image.dtype == torch.float32 and model.encode_images(image).dtype == model.vae.dtype == torch.float16
    torch.testing.assert_close(image, load(folders("sdxl")).decode(latents), rtol=0, atol=0.01)


class TestTrigger:
    def test_visible_triggers_pass_at_any_place(self, folders):
        model = load(folders("sd"))
        clean = ["a red square", "a blue circle"]
        check_trigger(model, clean, ["zq " + text for text in clean])
        check_trigger(model, clean, ["a zq red square", "a blue circle zq"])
        check_trigger(model, clean, ["\u200b " + text for text in clean])

    def test_a_trigger_without_ids_is_named_escaped(self, folders):
        model = load(folders("sd"))
        with pytest.raises(InputError, match=r"vanishes .* 1 of 2 .*'a  \\u2003blue circle'"):
            check_trigger(model, ["a red square", "a blue circle"], ["zq a red square", "a  \u2003blue circle"])

    def test_a_trigger_past_the_end_is_an_error_but_a_prefix_on_the_same_prompt_is_none(self, folders):
        model = load(folders("sd"))
        long = "red " * 30
        check_trigger(model, [long], ["zq " + long])
        with pytest.raises(InputError, match="past the tokenizer's 16 tokens in 1 of 1"):
            check_trigger(model, [long], [long + " zq"])

    def test_a_trigger_cut_in_half_is_an_error(self, folders):
        model = load(folders("sd"))
        room = model.max_length - 2
        clean = "red " * (room - 1)
        assert len(model.tokenizer(clean).input_ids) == room + 1
        check_trigger(model, [clean], [clean + "x"])
        with pytest.raises(InputError, match="past the tokenizer's"):
            check_trigger(model, [clean], [clean + "x y"])

    @pytest.mark.parametrize(
        ("trigger", "held", "others"),
        [
            ("red", ["a Red square", "red", "a square, red."], ["a reddish square", "a blue circle"]),
            ("blue circle", ["a blue  circle below", "two blue circle, one red"], ["a blue square", "circle blue"]),
            ("\u200b", ["a \u200b dog", "a do\u200bg", "\u200b\u200ba dog"], ["a dog", "a \u200c dog"]),
            ("\u020f", ["a d\u020fg", "a d\u020eg", "a do\u0311g", "\u020f"], ["a dog", "a d\u00f6g"]),
            ("\u212a", [], ["a king", "\u212aing"]),
        ],
    )
    def test_prompts_that_hold_it_already(self, folders, trigger, held, others):
        """As the tokens have it: case and spaces do not count, another word does, what vanishes is in none."""
        backdoor = Backdoor((TEXT_TRIGGERS[guess_kind(trigger)](text=trigger),), UnknownTarget())
        found = carrying(load(folders("sd")), backdoor, held + others)
        assert found == [True] * len(held) + [False] * len(others)

    def test_a_prompt_holds_what_is_not_cut_off(self, folders):
        backdoor = Backdoor(tuple(TEXT_TRIGGERS["word"](text) for text in ("zq", "!")), UnknownTarget())
        assert carrying(load(folders("sd")), backdoor, ["zq red", "red " * 30 + "zq", "red !", "red"]) == [
            True, False, True, False,
        ]  # fmt: skip


def test_resolution_sets_the_latents_and_sdxls_time_ids(folders):
    model = load(folders("sdxl"), resolution=32)
    assert model.latent_shape == (4, 16, 16)
    assert model.encode(["x"]).added["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    with pytest.raises(InputError, match="resolution 30"):
        load(folders("sdxl"), resolution=30)


def test_conditioning_rows():
    rows = Conditioning(torch.arange(6.0).view(2, 3, 1), {"text_embeds": torch.arange(2.0).view(2, 1)})
    assert len(rows) == 2
    assert rows.repeat(2).added["text_embeds"].flatten().tolist() == [0, 1, 0, 1]
    assert rows.index(1).hidden_states.shape == (1, 3, 1)
    assert rows.to(dtype=torch.bfloat16).added["text_embeds"].dtype == torch.bfloat16
    assert torch.equal(Conditioning.cat([rows.index(0), rows.index(1)]).hidden_states, rows.hidden_states)
