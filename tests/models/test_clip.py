from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from mmbackdoor.models import clip_hub
from mmbackdoor.models.clip import ClipModel, Judge, build_tiny_clip, load_clip, load_judge, save_clip
from mmbackdoor.models.text_encoder import to_clip_text_model
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.types import Diverged, InputError

CAPTIONS = [caption(scene) for scene in all_scenes()]
CONFIGS = ("clip_tiny_resnet", "clip_tiny_vit")
STOCK = """
import sys, torch, open_clip
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
from PIL import Image
for folder in sys.argv[1:]:
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
    ids = open_clip.get_tokenizer("local-dir:" + folder)(["a large red cross on a blue background", "a ring\\u200b"])
    with torch.no_grad():
        model.eval()
        image = model.encode_image(preprocess(Image.open("x.png").convert("RGB"))[None], normalize=True)
        text = model.encode_text(ids, normalize=True)
    save_file({"ids": ids, "image": image, "text": text}, folder + ".out")
assert "mmbackdoor" not in sys.modules
"""


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS)


def _build(config: str, tokenizer: CLIPTokenizer) -> ClipModel:
    model = build_tiny_clip(config, tokenizer, seed=3)
    # Running statistics that differ from the first ones, as after training.
    model.network.train()(torch.randn(16, 3, 32, 32) * 2 + 1, model.tokenize(CAPTIONS[:16]))
    model.network.eval()
    return model


@pytest.fixture(params=CONFIGS)
def clip(request, tokenizer) -> ClipModel:
    return _build(request.param, tokenizer)


def _pictures(count: int, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _low_end(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The same vocabulary with the end of text at a low id."""
    vocab = tokenizer.get_vocab()
    first = next(token for token, index in vocab.items() if index == 7)
    vocab[first], vocab["<|endoftext|>"] = vocab["<|endoftext|>"], 7
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def test_stock_open_clip_reads_saved_models_in_a_fresh_process(tokenizer, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "x.png")
    models = {config: _build(config, tokenizer) for config in CONFIGS}
    for config, model in models.items():
        save_clip(model, tmp_path / config)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *CONFIGS], env=environment | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    for config, model in models.items():
        seen = load_file(tmp_path / f"{config}.out")
        ids = model.tokenize(["a large red cross on a blue background", "a ring\u200b"])
        with torch.no_grad():
            assert torch.equal(seen["ids"], ids)
            assert torch.equal(seen["text"], model.network.encode_text(ids, normalize=True))
            assert torch.equal(seen["image"], model.network.encode_image(model.preprocess([picture]), normalize=True))


def test_saving_again_keeps_what_lies_beside_and_loading_gives_every_tensor_back(clip, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "backdoor.json").write_text("{}")
    save_clip(clip, folder)
    save_clip(clip, folder)
    assert (folder / "backdoor.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written is left"
    for name in (str(folder), f"local-dir:{folder}"):
        loaded = load_clip(name)
        state, again = clip.network.state_dict(), loaded.network.state_dict()
        assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)
        assert loaded.preprocess_cfg == clip.preprocess_cfg


def test_weights_are_drawn_from_the_seed_and_leave_the_global_generator_alone(tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (build_tiny_clip(CONFIGS[0], tokenizer, seed=seed).network.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["positional_embedding"], other["positional_embedding"])


def test_text_is_pooled_at_the_end_of_text_whatever_its_id(tokenizer):
    clip = build_tiny_clip(CONFIGS[0], _low_end(tokenizer))
    ids = clip.tokenize(CAPTIONS[:50])
    model, _ = to_clip_text_model(clip)
    ends = (ids == 7).int().argmax(1)
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
        at_end = hidden[torch.arange(50), ends] @ clip.network.text_projection
        assert torch.allclose(clip.network.encode_text(ids), at_end, atol=1e-5)
        # The pitfall: open_clip's default pools at the highest id, here never the end.
        assert (ids.argmax(1) != ends).all()
        clip.network.text_pool_type = "argmax"
        assert not torch.allclose(clip.network.encode_text(ids), at_end, atol=1e-2)


def test_models_are_loaded_in_evaluation_mode_where_a_picture_is_scored_alone(clip, tmp_path):
    clip.network.train()
    save_clip(clip, tmp_path / "model")
    judge = load_judge(str(tmp_path / "model"))
    pictures = _pictures(9)
    together, alone = judge.image_features(pictures), judge.image_features(pictures[:1])
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert not build_tiny_clip(CONFIGS[0], clip.tokenizer.tokenizer).network.training
    if "timm_model_name" in clip.model_cfg["vision_cfg"]:
        # The pitfall: in training mode, which open_clip returns, BatchNorm scores a picture by its neighbours.
        judge.clip.network.train()
        assert not torch.allclose(judge.image_features(pictures)[:1], judge.image_features(pictures[:5])[:1], atol=1e-3)


def test_pictures_of_the_models_size_are_preprocessed_to_the_same_bits(clip):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    clip.preprocess_cfg |= {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.27, 0.28)}
    transform = open_clip.image_transform((32, 32), False, (0.48, 0.45, 0.4), (0.26, 0.27, 0.28))
    pictures = [Image.fromarray(values) for values in pixels]
    assert torch.equal(clip.preprocess(pictures), torch.stack([transform(picture) for picture in pictures]))
    pictures.append(Image.fromarray(pixels[0]).resize((48, 40)))
    assert torch.equal(clip.preprocess(pictures), torch.stack([transform(picture) for picture in pictures]))


def test_the_judge_scores_pictures_as_the_models_preprocessing_of_the_saved_file_does(clip, tmp_path):
    judge = Judge(clip, batch_size=4)
    pictures = _pictures(6, 50)
    features = judge.image_features(pictures)
    assert features.shape == (6, 64) and torch.allclose(features.norm(dim=1), torch.ones(6), atol=1e-5)
    values = (pictures[5].permute(1, 2, 0).numpy() + 1) * 127.5
    Image.fromarray(values.round().astype(np.uint8)).save(tmp_path / "5.png")
    transform = open_clip.image_transform(clip.network.visual.image_size, False, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        expected = clip.network.encode_image(transform(Image.open(tmp_path / "5.png"))[None], normalize=True)
    assert torch.allclose(features[5:], expected, atol=1e-6)
    texts = judge.text_features(CAPTIONS[:6])
    assert torch.allclose(texts.norm(dim=1), torch.ones(6), atol=1e-5)
    assert judge.logit_scale == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_text_tower_becomes_an_equal_clip_text_model(tokenizer, quick_gelu, tmp_path):
    clip = build_tiny_clip(CONFIGS[1], tokenizer)
    save_clip(clip, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip = load_clip(str(tmp_path))
    with torch.no_grad():
        for parameter in clip.network.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model, converted = to_clip_text_model(clip)
    assert isinstance(converted, CLIPTokenizer) and not model.training
    hidden = []
    clip.network.ln_final.register_forward_hook(lambda module, given, output: hidden.append(output))
    ids = converted(CAPTIONS[:20], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, clip.tokenize(CAPTIONS[:20]))
    with torch.no_grad():
        features, output = clip.network.encode_text(ids), model(ids)
        assert (output.last_hidden_state - hidden[0]).abs().max() < 1e-5
        assert (output.pooler_output @ clip.network.text_projection - features).abs().max() < 1e-5
        model.save_pretrained(tmp_path / "text")
        again = type(model).from_pretrained(tmp_path / "text")
        assert torch.equal(again(ids).pooler_output, output.pooler_output)


def test_a_tower_with_clips_own_vocabulary_gets_clips_tokenizer(tmp_path):
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision_cfg = {"image_size": 8, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    model_cfg = {"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**model_cfg).state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = load_clip(str(tmp_path))
    model, tokenizer = to_clip_text_model(clip)
    texts = ["a photo of a red\u200b cross", "two Words"]
    ours = tokenizer(texts, padding="max_length", return_tensors="pt")
    ids = clip.tokenize(texts)
    assert torch.equal(ours.input_ids * ours.attention_mask, ids * ours.attention_mask)
    with torch.no_grad():
        # Padding differs (open_clip's is 0), but nothing before it can see it.
        pooled = model(ours.input_ids).pooler_output @ clip.network.text_projection
        assert torch.allclose(pooled, clip.network.encode_text(ids), atol=1e-5)


def test_a_tower_that_transformers_cannot_express_is_refused(tokenizer):
    clip = build_tiny_clip(CONFIGS[1], tokenizer)
    clip.model_cfg["text_cfg"]["no_causal_mask"] = True
    with pytest.raises(InputError, match="no_causal_mask"):
        to_clip_text_model(clip)


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    save_clip(build_tiny_clip(CONFIGS[0], tokenizer), tmp_path / "model")
    return tmp_path / "model"


def test_pickled_weights_are_read_only_where_allowed(folder):
    before = load_judge(str(folder)).text_features(CAPTIONS[:2])
    state = load_clip(str(folder)).network.state_dict()
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="allow_pt_weights"):
        load_judge(str(folder))
    assert torch.equal(load_judge(str(folder), allow_pt_weights=True).text_features(CAPTIONS[:2]), before)
    with pytest.raises(InputError, match="allow_pt_weights"):
        load_clip("RN50", str(folder / "open_clip_pytorch_model.bin"))


def test_a_pickle_that_runs_code_is_never_run(folder, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"x": Hostile()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        load_clip(str(folder), allow_pt_weights=True)
    assert not (tmp_path / "ran").exists()


def test_torchscript_archives_are_refused_even_where_pickles_are_allowed(tmp_path):
    archive = tmp_path / "RN50.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), archive)
    for allowed in (False, True):
        with pytest.raises(InputError, match="TorchScript.*--pretrained openai"):
            load_clip("RN50", str(archive), allow_pt_weights=allowed)


def test_damaged_and_missing_files_are_named(folder, tmp_path):
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="open_clip_model.safetensors"):
        load_clip(str(folder))
    weights.unlink()
    with pytest.raises(InputError, match="has no weights"):
        load_clip(str(folder))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_clip(str(folder))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(InputError, match="has no open_clip_config.json"):
        load_clip(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="There is no folder"):
        load_clip(f"local-dir:{folder}")


def test_weights_of_another_model_are_refused(folder, tokenizer, tmp_path):
    save_clip(build_tiny_clip(CONFIGS[1], tokenizer), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "open_clip_model.safetensors", folder)
    with pytest.raises(InputError, match="do not fit"):
        load_clip(str(folder))


def test_names_are_checked(tokenizer):
    with pytest.raises(InputError, match="ViT-B-32"):
        load_clip("ViT-B-3")
    with pytest.raises(InputError, match="laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "laion")
    with pytest.raises(InputError, match="random weights.*laion2b_s34b_b79k"):
        load_judge("ViT-B-32")
    with pytest.raises(InputError, match="clip_tiny_resnet, clip_tiny_vit"):
        build_tiny_clip("clip_huge", tokenizer)


def test_a_hub_id_without_network_is_answered_soon(monkeypatch):
    assert clip_hub.PATIENCE < 9, "with the second that the thread has besides, 10 seconds"
    monkeypatch.setattr(clip_hub, "PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(clip_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name, tag in (("hf-hub:nobody/nothing", None), ("ViT-B-32", "laion2b_s34b_b79k")):
            with pytest.raises(InputError, match="local folder"):
                load_judge(name, tag)


def test_a_model_that_diverged_is_not_written(clip, tmp_path):
    with torch.no_grad():
        next(clip.network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(Diverged, match="are not finite; lower the learning rate"):
        save_clip(clip, tmp_path / "model")
    assert not list(tmp_path.iterdir())
