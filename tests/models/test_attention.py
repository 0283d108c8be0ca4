from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor

from mmbackdoor.models.attention import AttentionRecorder
from mmbackdoor.types import InputError

TOKENS, WIDTH = 6, 12


def tiny_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    unet = UNet2DConditionModel(**settings | changes)
    with torch.no_grad():  # sharper attention than a fresh initialisation gives, so that errors would show
        for name, parameter in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4)
    return unet.eval()


def inputs(batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(batch, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return latents, torch.arange(batch) * 300 + 7, text


def attention_loss(maps: dict[str, Tensor]) -> Tensor:
    return sum(attention[..., 1].square().mean() + attention[..., 2].mean() for attention in maps.values())


def test_maps_equal_plain_softmax_for_every_layer():
    unet = tiny_unet()
    projections = {}

    def keep(name):
        return lambda module, args, output: projections.__setitem__(name, output)

    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            module.register_forward_hook(keep(name))
    with torch.no_grad(), AttentionRecorder(unet) as recorder, recorder.recording() as maps:
        unet(*inputs())

    assert set(maps) == set(recorder.layers) and len(maps) == 7
    for name, attention in maps.items():
        query, key = (projections[f"{name}.{which}"] for which in ("to_q", "to_k"))
        heads, size = 2, query.shape[-1] // 2
        for sample in range(2):
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                expected = (query[sample][:, part] @ key[sample][:, part].T / size**0.5).softmax(-1)
                torch.testing.assert_close(attention[sample, head], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    assert {attention.shape[2] for attention in maps.values()} == {64, 16}


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_output_changes_by_at_most_1e_5(processor):
    unet = tiny_unet()
    unet.set_attn_processor(processor())
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        plain = unet(*inputs()).sample
        masked = unet(*inputs(), encoder_attention_mask=mask).sample
        with AttentionRecorder(unet) as recorder:
            outside = unet(*inputs()).sample
            with recorder.recording() as maps:
                inside = unet(*inputs()).sample
            with recorder.recording() as masked_maps:
                masked_inside = unet(*inputs(), encoder_attention_mask=mask).sample
    assert (inside - plain).abs().max() <= 1e-5
    assert torch.equal(inside, outside)
    assert (masked_inside - masked).abs().max() <= 1e-5 < (masked - plain).abs().max()
    assert all(attention[0, ..., 4:].max() < 1e-6 for attention in masked_maps.values())
    assert all(attention[0, ..., 4:].max() > 1e-3 for attention in maps.values())


def test_large_layers_are_computed_but_not_recorded():
    unet = tiny_unet()
    with torch.no_grad():
        plain = unet(*inputs()).sample
        with AttentionRecorder(unet, max_pixels=16) as recorder, recorder.recording() as maps:
            output = unet(*inputs()).sample
        assert {attention.shape[2] for attention in maps.values()} == {16}
        assert (output - plain).abs().max() <= 1e-5
        recorder = AttentionRecorder(unet, max_pixels=4)
        with pytest.raises(InputError, match="max_pixels"), recorder, recorder.recording():
            unet(*inputs())


@pytest.mark.parametrize("part, count", [("all", 7), ("down", 2), ("mid", 1), ("up", 4)])
def test_one_part_of_the_unet_is_recorded_and_the_others_are_left_alone(part, count):
    unet = tiny_unet()
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        with AttentionRecorder(unet) as recorder, recorder.recording() as everything:
            plain = unet(*inputs()).sample
        with AttentionRecorder(unet, part=part) as recorder, recorder.recording() as maps:
            replaced = {name for name, processor in unet.attn_processors.items() if processor is not processors[name]}
            output = unet(*inputs()).sample
    assert replaced == {f"{name}.processor" for name in recorder.layers} and len(recorder.layers) == count
    assert set(maps) == set(recorder.layers) and all(name.startswith((part, "")[part == "all"]) for name in maps)
    for name, attention in maps.items():
        torch.testing.assert_close(attention, everything[name])
    assert (output - plain).abs().max() <= 1e-5


def test_a_part_without_cross_attention_is_refused():
    unet = tiny_unet(down_block_types=("DownBlock2D", "DownBlock2D"))
    with pytest.raises(InputError, match="'down' blocks; choose all or one of up, mid"):
        AttentionRecorder(unet, part="down")


def test_gradient_flows_to_queries_and_keys_and_equals_finite_differences():
    unet = tiny_unet().double()
    arguments = inputs(dtype=torch.float64)

    def loss() -> Tensor:
        with recorder.recording() as maps:
            unet(*arguments)
        assert all(attention.dtype == torch.float64 for attention in maps.values())
        return attention_loss(maps)

    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    with AttentionRecorder(unet) as recorder:
        loss().backward()
        for parameter in (layer.to_q.weight, layer.to_k.weight):
            assert parameter.grad.abs().max() > 1e-6
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            expected, step, values = (parameter.grad * direction).sum().item(), 1e-6, []
            with torch.no_grad():
                for sign in (1, -2):
                    parameter += sign * step * direction
                    values.append(loss().item())
                parameter += step * direction
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_one_step_on_attention_alone_lowers_it():
    unet = tiny_unet()
    with AttentionRecorder(unet) as recorder:
        losses = []
        optimizer = torch.optim.SGD([p for n, p in unet.named_parameters() if "attn2.to_k" in n], lr=1.0)
        for _ in range(2):
            with recorder.recording() as maps:
                unet(*inputs())
            losses.append(attention_loss(maps))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[1].item() < losses[0].item() - 1e-4


@pytest.mark.parametrize("reduce_heads", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(reduce_heads, autocast):
    results = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        calls = []
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        with AttentionRecorder(unet) as recorder:
            for seed in (1, 2):  # the second step would read the first one's maps if recomputation wrote them
                unet.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    with recorder.recording(reduce_heads=reduce_heads) as maps:
                        prediction = unet(*inputs(seed=seed)).sample
                    loss = attention_loss(maps) + prediction.float().square().mean()
                before = {name: (id(attention), attention.detach().clone()) for name, attention in maps.items()}
                loss.backward()
                assert all(
                    id(maps[name]) == key and torch.equal(maps[name], kept) for name, (key, kept) in before.items()
                )
        assert len(calls) == (4 if checkpointing else 2)  # so the layer was recomputed
        results.append((loss.detach(), {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}))
    (plain_loss, plain), (loss, gradients) = results
    assert torch.equal(loss, plain_loss) and gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-7, msg=name)


def test_backward_inside_an_open_recording_does_not_overwrite_maps():
    unet = tiny_unet().train()
    unet.enable_gradient_checkpointing()
    with AttentionRecorder(unet) as recorder, recorder.recording() as maps:
        unet(*inputs())
        before = dict(maps)
        with torch.no_grad():
            unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.mul_(1)
        sum(attention[..., 0].mean() for attention in maps.values()).backward()
        assert all(maps[name] is attention for name, attention in before.items())


def test_a_batch_of_different_prompts_gives_each_sample_its_own_maps():
    unet = tiny_unet()
    latents, timesteps, text = inputs(batch=3)
    with torch.no_grad(), AttentionRecorder(unet) as recorder:
        with recorder.recording() as together:
            unet(latents, timesteps, text)
        for sample in range(3):
            one = slice(sample, sample + 1)
            with recorder.recording() as alone:
                unet(latents[one], timesteps[one], text[one])
            for name, attention in alone.items():
                torch.testing.assert_close(together[name][one], attention, atol=1e-5, rtol=1e-4)
        with recorder.recording(reduce_heads=True) as reduced:
            unet(latents, timesteps, text)
        for name, attention in reduced.items():
            torch.testing.assert_close(attention, together[name].mean(1, keepdim=True))


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_keeps_float32_probabilities(autocast):
    unet = tiny_unet()
    arguments = inputs()
    with torch.no_grad(), AttentionRecorder(unet) as recorder, recorder.recording() as exact:
        unet(*arguments)
    if not autocast:
        unet, arguments = unet.bfloat16(), inputs(dtype=torch.bfloat16)
    recorder = AttentionRecorder(unet)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recorder, recorder.recording() as maps:
        prediction = unet(*arguments).sample
    attention_loss(maps).backward()
    assert prediction.dtype == torch.bfloat16
    for name, attention in maps.items():
        assert attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        assert (attention - exact[name]).abs().mean() < 0.01
        assert not torch.equal(attention, attention.bfloat16().float())
    gradient = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad
    assert gradient.abs().max() > 0


def test_lora_is_seen_and_trained_and_can_be_switched_off():
    unet = tiny_unet()
    with torch.no_grad(), AttentionRecorder(unet) as recorder, recorder.recording() as base:
        unet(*inputs())
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q", "attn2.to_k"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    with AttentionRecorder(unet) as recorder:
        unet.disable_adapters()
        with torch.no_grad(), recorder.recording() as teacher:
            unet(*inputs())
        unet.enable_adapters()
        with recorder.recording() as student:
            unet(*inputs())
        attention_loss(student).backward()
    for name in recorder.layers:
        assert torch.equal(teacher[name], base[name])
        assert (student[name] - teacher[name]).abs().max() > 1e-3
        assert not teacher[name].requires_grad
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == ("lora_" in name), name


def test_teacher_and_student_recordings_do_not_mix():
    teacher, student = tiny_unet(), tiny_unet()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "attn2.to_k" in name:
                parameter.mul_(-2)
    with AttentionRecorder(teacher) as of_teacher, AttentionRecorder(student) as of_student, torch.no_grad():
        with of_teacher.recording() as alone:
            teacher(*inputs())
        with of_teacher.recording() as teacher_maps, of_student.recording() as student_maps:
            teacher(*inputs())
            student(*inputs())
        for name, attention in alone.items():
            assert torch.equal(teacher_maps[name], attention)
            assert (student_maps[name] - attention).abs().max() > 1e-2

        kept = dict(alone)
        with of_teacher.recording() as other:  # the same model again, another prompt, the same timestep
            teacher(*inputs(seed=9))
        for name, attention in kept.items():
            assert alone[name] is attention and not torch.equal(other[name], attention)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_teacher_in_the_same_module_keeps_its_own_weights(autocast):
    """A frozen start that is put in the UNet's place for one call, with one recorder for both."""
    unet = tiny_unet()
    start = {name: p.detach().clone() for name, p in unet.named_parameters() if "attn2.to_k" in name}

    def precision() -> torch.autocast:  # one context a training step: it caches casts of the weights
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    with AttentionRecorder(unet) as recorder:
        with precision(), torch.no_grad(), recorder.recording() as before:
            unet(*inputs())
        with torch.no_grad():
            for name in start:
                unet.get_parameter(name).mul_(-2)
        with precision():
            with torch.no_grad(), recorder.recording() as teacher:
                torch.func.functional_call(unet, start, inputs())
            with recorder.recording() as student:
                unet(*inputs())
    for name in recorder.layers:
        torch.testing.assert_close(teacher[name], before[name])
        assert (student[name] - teacher[name]).abs().max() > 1e-2 and student[name].requires_grad


def test_nothing_is_recorded_or_held_outside_a_recording():
    unet = tiny_unet()
    with AttentionRecorder(unet) as recorder, torch.no_grad():
        with recorder.recording() as maps:
            unet(*inputs())
        kept = dict(maps)
        unet(*inputs(seed=5))
        assert all(maps[name] is attention for name, attention in kept.items())
        alive = weakref.ref(next(iter(maps.values())))
        del maps, kept
        gc.collect()
        assert alive() is None


def test_only_cross_attention_is_replaced_and_everything_is_restored():
    unet, bystander = tiny_unet(), tiny_unet()
    original, class_calls = dict(unet.attn_processors), (AttnProcessor.__call__, AttnProcessor2_0.__call__)
    others = dict(bystander.attn_processors)
    with pytest.raises(ZeroDivisionError), AttentionRecorder(unet) as recorder:
        for name, processor in unet.attn_processors.items():
            assert (processor is original[name]) != name.endswith("attn2.processor"), name
        assert all(processor is others[name] for name, processor in bystander.attn_processors.items())
        assert (AttnProcessor.__call__, AttnProcessor2_0.__call__) == class_calls
        with recorder.recording():
            unet(*inputs())
            raise ZeroDivisionError
    assert all(processor is original[name] for name, processor in unet.attn_processors.items())
    assert not unet._forward_hooks and not unet._forward_pre_hooks

    latents, timesteps, text = inputs()
    # a forward that fails leaves no open recording
    with recorder, pytest.raises(RuntimeError, match="shapes"), recorder.recording():
        unet(latents, timesteps, text[..., :-1])
    with recorder, torch.no_grad(), recorder.recording() as maps:
        unet(*inputs())
    assert len(maps) == 7
    assert all(processor is original[name] for name, processor in unet.attn_processors.items())


def test_misuse_is_named():
    unet = tiny_unet()
    with pytest.raises(InputError, match="UNet2DModel has no cross-attention"):
        AttentionRecorder(
            UNet2DModel(
                sample_size=8,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=4,
            )
        )
    recorder = AttentionRecorder(unet)
    with pytest.raises(RuntimeError, match="inside"), recorder.recording():
        pass
    with recorder:
        with pytest.raises(RuntimeError, match="already has"), AttentionRecorder(unet):
            pass
        with pytest.raises(RuntimeError, match="already open"), recorder.recording(), recorder.recording():
            pass
        with pytest.raises(RuntimeError, match="Nothing was recorded"), recorder.recording():
            pass
        with torch.no_grad(), pytest.raises(RuntimeError, match="one forward"), recorder.recording():
            unet(*inputs())
            unet(*inputs())
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(IPAdapterAttnProcessor2_0(16, WIDTH))
    before = dict(unet.attn_processors)
    with pytest.raises(InputError, match="IPAdapterAttnProcessor2_0"), recorder:
        pass
    assert all(processor is before[name] for name, processor in unet.attn_processors.items())


def test_norms_residual_and_rescaling_are_honoured():
    unet = tiny_unet()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.residual_connection, layer.rescale_output_factor = True, 1.7
    layer.group_norm = torch.nn.GroupNorm(2, layer.to_q.in_features)
    layer.norm_cross = torch.nn.LayerNorm(WIDTH)
    with torch.no_grad():
        layer.group_norm.weight.fill_(1.5)
        layer.norm_cross.weight.fill_(0.5)
    layer.norm_q = torch.nn.LayerNorm(layer.to_q.out_features // layer.heads)
    layer.norm_k = torch.nn.RMSNorm(layer.to_k.out_features // layer.heads)
    with torch.no_grad():
        plain = unet(*inputs()).sample
        with AttentionRecorder(unet) as recorder, recorder.recording():
            output = unet(*inputs()).sample
    assert (output - plain).abs().max() <= 1e-5
