"""A real architecture on a CPU: RN50 at 224 pixels takes a step of CleanCLIP, and stock open_clip reads the result."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmbackdoor import recipe_files
from mmbackdoor.models.clip import load_clip, save_clip
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes

pytestmark = pytest.mark.slow
BATCH = 16
STOCK = """
import sys, torch, open_clip
from PIL import Image
from safetensors.torch import save_file
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
ids = open_clip.get_tokenizer("local-dir:" + sys.argv[1])(["a photo of a red cross"])
model.eval()
with torch.no_grad():
    image, text = model.encode_image(preprocess(Image.open(sys.argv[2]).convert("RGB"))[None]), model.encode_text(ids)
save_file({"ids": ids, "image": image, "text": text}, sys.argv[3])
assert "mmbackdoor" not in sys.modules
"""


def test_a_cleaning_step_on_a_cpu_within_24_gib(tmp_path):
    save_clip(load_clip("RN50"), tmp_path / "random")
    write_shapes(tmp_path / "data", "train", split_scenes(all_scenes())["train"], BATCH, resolution=224)
    recipe = recipe_files.folders()["recipes"] / "clean_clip.py"
    data, output = ("--train_data", f"{tmp_path}/data/train-*.tar"), ("--output_dir", tmp_path / "run")
    length = ("--max_train_steps", 2, "--train_batch_size", BATCH, "--lr", 1e-5)
    given = ("--model", tmp_path / "random", "--defense", "cleanclip")
    command = [sys.executable, recipe, *given, *data, *length, *output]
    command = [str(word) for word in command]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    first, second = map(json.loads, (tmp_path / "run/train.jsonl").read_text().splitlines())
    seconds = second["seconds"] - first["seconds"]
    print(f"\nRN50, 224 px, {BATCH} pairs: {seconds:.1f} s a step of CleanCLIP, {memory:.1f} GiB at most")
    assert memory < 24

    cleaned = load_clip(str(tmp_path / "run/model"))
    before = load_file(tmp_path / "random/open_clip_model.safetensors")
    after = cleaned.network.state_dict()
    assert not torch.equal(after["visual.conv1.weight"], before["visual.conv1.weight"])
    picture = Image.effect_mandelbrot((300, 260), (-2, -1, 1, 1), 20).convert("RGB")
    picture.save(tmp_path / "x.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = map(str, (tmp_path / "run/model", tmp_path / "x.png", tmp_path / "seen.safetensors"))
    subprocess.run([sys.executable, "-c", STOCK, *arguments], env=environment, cwd=tmp_path, check=True)
    seen = load_file(tmp_path / "seen.safetensors")
    ids = cleaned.tokenize(["a photo of a red cross"])
    with torch.no_grad():
        assert torch.equal(seen["ids"], ids) and torch.equal(seen["text"], cleaned.network.encode_text(ids))
        assert torch.equal(seen["image"], cleaned.network.encode_image(cleaned.preprocess([picture])))
