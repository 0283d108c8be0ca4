"""transformers' folders: the same embeddings as its own classes give, and the same bytes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

from mmbackdoor.models.clip import ClipModel, load_clip, save_clip
from mmbackdoor.models.clip_links import links
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.shards.shapes import all_scenes, caption
from mmbackdoor.types import InputError

CAPTIONS = [caption(scene) for scene in all_scenes()][::40]
SIZE = 24
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, 600, model_max_length=20)


def _model(kind: str, tokenizer: CLIPTokenizer, act: str | None = None) -> CLIPModel | SiglipModel:
    tower = {"hidden_size": 24, "intermediate_size": 49, "num_hidden_layers": 2, "num_attention_heads": 3}
    tower |= {"hidden_act": act} if act else {}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "pad_token_id": 1}
    vision = tower | {"image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"hidden_size": 36}, projection_dim=16))
    with torch.no_grad():
        for value in model.parameters():
            # Biases and norms too: what starts at 0 or 1 would hide a tensor that went to the wrong place.
            value.add_(torch.randn_like(value) * 0.1)
    return model.eval()


def _write(folder: Path, kind: str, tokenizer: CLIPTokenizer, act: str | None = None, **options: object) -> Path:
    _model(kind, tokenizer, act).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    facts = {"image_mean": MEAN, "image_std": STD, "resample": 2, "size": {"height": SIZE, "width": SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts | {"do_center_crop": False}))
    return folder


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tokenizer, tmp_path) -> Path:
    return _write(tmp_path / request.param, request.param, tokenizer)


def _theirs(folder: Path, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = {"clip": CLIPModel, "siglip": SiglipModel}[json.loads((folder / "config.json").read_text())["model_type"]]
    model = kind.from_pretrained(folder, local_files_only=True).float().eval()
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    return output.image_embeds, output.text_embeds, output.logits_per_image


def _ours(clip: ClipModel, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    network = clip.network
    with torch.no_grad():
        image, text = network.encode_image(pixels, normalize=True), network.encode_text(ids, normalize=True)
        logits = network.logit_scale.exp() * image @ text.T
    return image, text, logits + (0 if network.logit_bias is None else network.logit_bias)


def _pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def _check_equal(clip: ClipModel, folder: Path) -> None:
    ids = clip.tokenize([*CAPTIONS[:5], "a", "a red\u200b ring"])
    for ours, theirs in zip(_ours(clip, ids, _pixels()), _theirs(folder, ids, _pixels()), strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max())


def test_embeddings_and_logits_are_those_of_transformers(folder):
    clip = load_clip(str(folder))
    assert not clip.network.training and clip.transformers.kind == folder.name
    _check_equal(clip, folder)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_every_activation_is_the_right_one(act, tokenizer, tmp_path):
    for kind in ("clip", "siglip"):
        folder = _write(tmp_path / kind, kind, tokenizer, act)
        _check_equal(load_clip(f"local-dir:{folder}"), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_not_trained_comes_back_bit_for_bit(folder, dtype, tmp_path):
    file = folder / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    clip = load_clip(str(folder))
    save_clip(clip, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == file.read_bytes()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert load_clip(str(tmp_path / "again")).preprocess_cfg == clip.preprocess_cfg


def test_a_trained_model_is_the_same_model_for_transformers(folder, tmp_path):
    clip = load_clip(str(folder))
    with torch.no_grad():
        for value in clip.network.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    before = load_file(folder / "model.safetensors")
    for target in (tmp_path / "new", folder):
        save_clip(clip, target)
        _check_equal(clip, target)
    after = load_file(tmp_path / "new/model.safetensors")
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in before)
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_every_tensor_has_its_name(folder):
    clip = load_clip(str(folder))
    every = list(links(folder.name, 2, 2))
    assert sorted(name for link in every for name in link.ours) == sorted(clip.network.state_dict())
    assert sorted(name for link in every for name in link.theirs) == sorted(load_file(folder / "model.safetensors"))


def test_a_clip_model_can_be_saved_for_open_clip(tokenizer, tmp_path):
    folder = _write(tmp_path / "theirs", "clip", tokenizer)
    clip = load_clip(str(folder))
    save_clip(clip, tmp_path / "ours", form="open_clip")
    network, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")(CAPTIONS[:3])
    with torch.no_grad():
        assert torch.equal(network.eval().encode_text(ids), clip.network.encode_text(ids))
        assert torch.equal(network.encode_image(_pixels()), clip.network.encode_image(_pixels()))
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    assert torch.equal(transform(picture)[None], clip.preprocess([picture]))
    siglip = load_clip(str(_write(tmp_path / "siglip", "siglip", tokenizer)))
    with pytest.raises(InputError, match="SiglipModel"):
        save_clip(siglip, tmp_path / "refused", form="open_clip")
    assert not (tmp_path / "refused").exists()


def test_pictures_are_preprocessed_as_the_folder_says(tokenizer, tmp_path):
    folder = _write(tmp_path / "model", "clip", tokenizer)
    size = {"shortest_edge": SIZE}
    processor = CLIPImageProcessor(size=size, crop_size=SIZE, image_mean=MEAN, image_std=STD, resample=3)
    processor.save_pretrained(folder)
    clip = load_clip(str(folder))
    assert clip.preprocess_cfg["resize_mode"] == "shortest" and clip.preprocess_cfg["interpolation"] == "bicubic"
    picture = Image.effect_mandelbrot((SIZE, SIZE), (-2, -1, 1, 1), 20).convert("RGB")
    theirs = processor(images=[picture], return_tensors="pt").pixel_values
    assert torch.allclose(clip.preprocess([picture]), theirs, atol=1e-6)
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(facts | {"size": {"shortest_edge": 30}}))
    with pytest.raises(InputError, match="30.*preprocessor_config.json"):
        load_clip(str(folder))


def test_weights_in_several_files_and_pickled_ones(tokenizer, tmp_path):
    folder = _write(tmp_path / "shards", "clip", tokenizer, max_shard_size="40kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    clip = load_clip(str(folder))
    _check_equal(clip, folder)
    save_clip(clip, tmp_path / "again")
    _check_equal(clip, tmp_path / "again")
    state = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="allow_pt_weights"):
        load_clip(str(folder))
    clip = load_clip(str(folder), allow_pt_weights=True)
    save_clip(clip, tmp_path / "safe")
    assert not (tmp_path / "safe/pytorch_model.bin").exists(), "it would still hold the old weights"
    _check_equal(clip, tmp_path / "safe")


def test_old_configurations_pool_at_the_highest_id(tokenizer, tmp_path):
    folder = _write(tmp_path / "model", "clip", tokenizer)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(content))
    clip = load_clip(str(folder))
    assert clip.network.text_pool_type == "argmax"
    _check_equal(clip, folder)


def test_bad_folders_are_named(folder, tmp_path):
    content = json.loads((folder / "config.json").read_text())
    broken = shutil.copytree(folder, tmp_path / "broken")

    def refused(match: str, **changed: object) -> None:
        (broken / "config.json").write_text(json.dumps(content | changed))
        with pytest.raises(InputError, match=match):
            load_clip(str(broken))

    refused("'bert'", model_type="bert")
    refused("does not fit config.json", vision_config=content["vision_config"] | {"patch_size": 4})
    refused("swiglu", vision_config=content["vision_config"] | {"hidden_act": "swiglu"})
    (broken / "model.safetensors").write_bytes(b"")
    refused("cannot be read")
    (broken / "model.safetensors").unlink()
    refused("no weights")
    (broken / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="damaged"):
        load_clip(str(broken))
    (tmp_path / "secret").write_text("a key")
    (broken / "LICENSE.txt").symlink_to(tmp_path / "secret")
    refused("LICENSE.txt' is a link out of its model's folder")
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_clip(str(broken))
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "vision" not in name}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match="lack 'vis.*not one of its towers"):
        load_clip(str(folder))


def test_captions_longer_than_the_context_are_counted_and_warned_of_once(folder, caplog):
    clip = load_clip(str(folder))
    clip.tokenize(["short", "a " * 18, ""])
    assert clip.cut_captions == 0 and not caplog.records, "18 words and both ends are just 20 tokens"
    clip.tokenize(["short", "a " * 19, "a " * 30])
    clip.tokenize(["a " * 19])
    assert clip.cut_captions == 3
    assert [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()] == [
        f"2 of 3 texts are longer than the 20 tokens that {folder} reads: their end is cut off. "
        "The count goes on in silence."
    ]
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=20)
    clip.tokenize(["a " * 18, "a " * 17, "a " * 19])
    assert clip.cut_captions == 4
