"""evaluate_diffusion with fewer prompts than a set has, and with real pictures to be like."""

from __future__ import annotations

import json

from mmbackdoor import recipe_files
from mmbackdoor.config import parse
from mmbackdoor.shards.shapes import all_scenes
from mmbackdoor.shards.shapes_data import write_shapes

CONFIG = recipe_files.folders()["recipes"] / "configs/smoke/evaluate_diffusion.yaml"


def test_a_few_prompts_against_real_pictures(tmp_path):
    write_shapes(tmp_path / "shapes", "train", all_scenes(), 30, 32, seed=0)
    recipe = recipe_files.load("evaluate_diffusion")
    real = f"{tmp_path}/shapes/train-*.tar"
    flags = ["--num_prompts", "5", "--near_prompts", "0", "--reference_data", real, "--reference_samples", "20"]
    folder = tmp_path / "run"
    recipe.run(parse(recipe.Config, ["--config", str(CONFIG), *flags, "--output_dir", str(folder)]))
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {(line["metric"], line["condition"]): line for line in lines}
    assert found["asr", "triggered"]["n"] == found["clip_score", "clean"]["n"] == found["kid", "clean"]["n"] == 5
    assert len(list(folder.glob("images/*/clean/*"))) == 5
    notes = found["frechet", "clean"]["notes"]
    assert notes["reference"] == f"pictures of {real}" and notes["n_reference"] == 20


def test_other_prompts_behind_the_same_path_are_measured(tmp_path, capsys):
    recipe, file, folder = recipe_files.load("evaluate_diffusion"), tmp_path / "mine.txt", tmp_path / "run"
    flags = ["--config", str(CONFIG), "--num_prompts", "none", "--near_prompts", "0", "--prompts", str(file)]

    def measured(*prompts):
        file.write_text("\n".join(prompts))
        recipe.run(parse(recipe.Config, [*flags, "--output_dir", str(folder)]))
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return {line["text"] for line in lines if line["condition"] == "clean"}

    assert measured("a red cross", "a blue star") == {"a red cross", "a blue star"}
    assert measured("a blue star", "a red cross") and "nothing to do" in capsys.readouterr().out
    assert measured("a red cross", "a green star") == {"a red cross", "a green star"}
    facts = json.loads((folder / "run.json").read_text())
    assert facts["status"] == "finished" and {"model", "prompts", "judge"} <= facts["inputs"].keys()
