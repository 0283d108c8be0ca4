import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from mmbackdoor.evaluate.generate import Job, Sampling, generate, initial_latents, load_images, sample
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.types import InputError
from tests.evaluate.pipelines import scheduler, text_config, tiny_pipe, unet, vae

PROMPTS = ["a red square on a blue background", "a green ring", "a yellow cross in front of a pink background"]


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    return train_tokenizer(PROMPTS, vocab_size=560)


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return tiny_pipe(tokenizer)


@pytest.fixture
def model(pipe):
    pipe.scheduler = scheduler()
    return DiffusionModel(pipe)


def stock(pipe, jobs, sampling, **more):
    shape = (4, 8, 8)
    latents = torch.stack([initial_latents(shape, sampling.seed, job.prompt_id, job.seed_index) for job in jobs])
    images = pipe(
        [job.text for job in jobs], latents=latents, num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale, output_type="pt", **more,
    ).images  # fmt: skip
    return images * 2 - 1


JOBS = [Job(f"p{k}", "clean", text) for k, text in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("kind", "guidance_scale", "negative"),
    [
        (DDIMScheduler, 5.0, None),
        (DDIMScheduler, 1.0, None),
        (PNDMScheduler, 7.5, "ugly"),
        (DPMSolverMultistepScheduler, 3.0, None),
    ],
)
def test_pictures_are_the_stock_pipelines(pipe, kind, guidance_scale, negative):
    pipe.scheduler = scheduler(kind, **({"skip_prk_steps": True} if kind is PNDMScheduler else {}))
    sampling = Sampling(num_inference_steps=6, guidance_scale=guidance_scale, negative_prompt=negative)
    ours = sample(DiffusionModel(pipe), JOBS, sampling)
    more = {"negative_prompt": [negative] * 3} if negative else {}
    assert ours.std() > 0.01
    assert torch.allclose(ours, stock(pipe, JOBS, sampling, **more), atol=2e-4)


def test_stochastic_schedulers_draw_paired_noise(pipe):
    pipe.scheduler = scheduler(EulerAncestralDiscreteScheduler)
    model, sampling = DiffusionModel(pipe), Sampling(num_inference_steps=4)
    together = sample(model, JOBS, sampling)
    alone = sample(model, JOBS[2:], sampling)
    assert torch.allclose(together[2:], alone, atol=1e-4)
    assert torch.equal(sample(model, JOBS, sampling), together)


def test_sdxl_pictures_are_the_stock_pipelines(tokenizer):
    torch.manual_seed(0)
    projecting = CLIPTextModelWithProjection(text_config(tokenizer))
    pipe = StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config(tokenizer)), text_encoder_2=projecting, tokenizer=tokenizer,
        tokenizer_2=tokenizer, scheduler=scheduler(), add_watermarker=False,
        unet=unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(1, 1), use_linear_projection=True,
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    sampling = Sampling(num_inference_steps=4, guidance_scale=5.0)
    ours = sample(DiffusionModel(pipe), JOBS, sampling)
    assert torch.allclose(ours, stock(pipe, JOBS, sampling), atol=2e-4)


def test_initial_latents_depend_on_names_alone():
    first = initial_latents((4, 8, 8), 3, "a", 1)
    assert torch.equal(first, initial_latents((4, 8, 8), 3, "a", 1))
    for other in [(4, "a", 1), (3, "b", 1), (3, "a", 2)]:
        assert not torch.equal(first, initial_latents((4, 8, 8), *other))


def test_conditions_share_their_latents(model):
    """Without steps' worth of difference in text the triggered picture is the clean one, bit for bit."""
    clean = Job("p", "clean", PROMPTS[0], 2)
    triggered = Job("p", "triggered", PROMPTS[0], 2)
    images = sample(model, [clean, triggered], Sampling(num_inference_steps=3))
    assert torch.allclose(images[0], images[1], atol=1e-6)
    other = sample(model, [Job("p", "clean", PROMPTS[0], 3)], Sampling(num_inference_steps=3))
    assert (other[0] - images[0]).abs().max() > 0.05


def jobs_for(count):
    return [Job(f"p{k}", "near:seen:doubled", PROMPTS[k % 3]) for k in range(count)]


def test_two_ranks_write_what_one_writes(model, tmp_path):
    sampling = Sampling(num_inference_steps=2)
    one, two = tmp_path / "one", tmp_path / "two"
    paths = generate(model, jobs_for(7), out_dir=one, name="m", sampling=sampling, batch_size=2)
    for rank in (1, 0):
        generate(model, jobs_for(7), out_dir=two, name="m", sampling=sampling, batch_size=2, rank=rank, world_size=2)
    assert len(paths) == 7 and all((one / path).read_bytes() == (two / path).read_bytes() for path in paths)


def test_resume_skips_finished_and_repairs_the_rest(model, tmp_path, monkeypatch):
    sampling = Sampling(num_inference_steps=2)

    def run(sampling=sampling, jobs=None, name="m"):
        return generate(model, jobs or jobs_for(4), out_dir=tmp_path, name=name, sampling=sampling, batch_size=2)

    paths = [tmp_path / path for path in run()]
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][:30])
    paths[1].unlink()
    calls = []
    import mmbackdoor.evaluate.generate as module

    real = module.sample
    monkeypatch.setattr(module, "sample", lambda *given: calls.append(given[1]) or real(*given))
    run()
    assert len(calls) == 1 and [path.read_bytes() for path in paths] == whole
    run()
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_stale_pictures_are_made_anew(model, tmp_path):
    sampling = Sampling(num_inference_steps=2)
    job = jobs_for(1)

    def run(job=job, sampling=sampling):
        (path,) = generate(model, job, out_dir=tmp_path, name="m", sampling=sampling)
        return (tmp_path / path).read_bytes()

    first = run()
    assert run(sampling=Sampling(num_inference_steps=3)) != first
    assert run() == first
    assert run([Job(job[0].prompt_id, job[0].condition, "another text")]) != first
    weight = model.unet.conv_out.bias
    with torch.no_grad():
        weight.add_(1.0)
        changed = run()
        weight.sub_(1.0)
    assert changed != first


def test_files_hold_the_eight_bit_picture(model, tmp_path):
    sampling = Sampling(num_inference_steps=2)
    jobs = jobs_for(2)
    paths = [tmp_path / p for p in generate(model, jobs, out_dir=tmp_path, name="m", sampling=sampling, batch_size=2)]
    images = sample(model, jobs, sampling)
    assert (load_images(paths) - images).abs().max() <= 1.01 / 255
    assert np.asarray(Image.open(paths[0])).shape == (16, 16, 3)
    assert ":" not in paths[0].name + paths[0].parent.name


def test_bad_requests_are_sentences(model, tmp_path):
    with pytest.raises(InputError, match="NoSuchScheduler.*choose from.*DDIMScheduler"):
        sample(model, JOBS, Sampling(scheduler="NoSuchScheduler"))
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        generate(model, jobs_for(1), out_dir=tmp_path, name="m", sampling=Sampling(num_inference_steps=1))
    with pytest.raises(ValueError, match="same picture"):
        generate(model, jobs_for(1) * 2, out_dir=tmp_path, name="m", sampling=Sampling())


def test_named_scheduler_is_used(model):
    own = sample(model, JOBS[:1], Sampling(num_inference_steps=4))
    euler = sample(model, JOBS[:1], Sampling(num_inference_steps=4, scheduler="EulerDiscreteScheduler"))
    assert (own - euler).abs().max() > 1e-3
