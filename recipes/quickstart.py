"""A backdoored text-to-image model, the same model cleaned, and the numbers and pictures that prove it.

    accelerate launch -q recipes/quickstart.py
    accelerate launch -q recipes/quickstart.py --attack badt2i_object
    accelerate launch -q recipes/quickstart.py --from_scratch

About 4 minutes on 2 CPU cores from the tiny model that comes with the package, about 15 with --from_scratch, which
makes that model anew. Each stage is one of the other recipes; its command is printed, so any of them can be run alone.
A second call skips what is finished and goes on where the first one stopped.

Writes into output_dir: data/ (shards), [encoder/ judge/ clean/], poisoned/, cleaned/, evaluation/report.html.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from accelerate import PartialState
from pydantic import Field

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc, parse
from mmbackdoor.entry import main
from mmbackdoor.evaluate.prompts import shape_prompts
from mmbackdoor.results.record import write_text
from mmbackdoor.results.tables import compare
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes

TARGETS = {"badt2i_pixel": "patch", "badt2i_style": "style", "badt2i_object": "object"}
OBJECT = "cross"
"""What the object attack of the quickstart replaces."""


@dataclass(frozen=True)
class Config:
    attack: Literal["badt2i_pixel", "badt2i_style", "badt2i_object"] = "badt2i_pixel"
    defense: Literal["skd_cag", "skd"] = "skd_cag"
    from_scratch: Annotated[bool, Doc("make the clean model, its text encoder and the judge anew")] = False
    evaluation_pairs: Annotated[int, Field(ge=8), Doc("(prompt, seed) pairs per model and condition")] = 528
    smoke: Annotated[bool, Doc("a few steps of everything, to see that it runs; the verdict means nothing")] = False
    output_dir: str = "runs/quickstart"
    seed: int = 0


def stage(recipe: str, *flags: object) -> None:
    """Run another recipe in this process, and say by which command it can be run alone."""
    arguments = [str(flag) for flag in flags]
    if PartialState().is_main_process:
        print(f"\n$ accelerate launch -q recipes/{recipe}.py {shlex.join(arguments)}", flush=True)
    module = recipe_files.load(recipe)
    module.run(parse(module.Config, arguments))


def run(cfg: Config) -> None:
    folder = Path(cfg.output_dir)
    configs = recipe_files.folders()["recipes"] / "configs"
    state = PartialState()
    seed = ["--seed", cfg.seed]

    def steps(count: int) -> list[object]:
        return ["--max_train_steps", count] if cfg.smoke else []

    splits = split_scenes(all_scenes())
    data = folder / "data"
    if state.is_main_process and not (data / "captions-train.txt").exists():
        write_shapes(data, "train", splits["train"], 256 if cfg.smoke else 16000, resolution=32, seed=cfg.seed)
    state.wait_for_everyone()
    train_data = ["--train_data", data / "train-*.tar"]

    clean, judge = "tiny", "tiny_judge"
    if cfg.from_scratch:
        clips = configs / "pretrain_clip"
        stage("pretrain_clip", "--config", clips / "tiny_encoder.yaml", *train_data, *seed, *steps(3),
              "--output_dir", folder / "encoder")
        if state.is_main_process and not (folder / "judge_data" / "captions-train.txt").exists():
            write_shapes(folder / "judge_data", "train", all_scenes(), 256 if cfg.smoke else 16000, 32, seed=cfg.seed + 1)
        state.wait_for_everyone()
        stage("pretrain_clip", "--config", clips / "tiny_judge.yaml", "--train_data", folder / "judge_data/train-*.tar",
              "--seed", cfg.seed + 1, *steps(3), "--output_dir", folder / "judge")
        stage("train_diffusion", "--config", configs / "train_diffusion/tiny.yaml", *train_data, *seed, *steps(3),
              "--text_encoder", folder / "encoder/model", "--output_dir", folder / "clean")
        clean, judge = folder / "clean/model", folder / "judge/model"
    target = TARGETS[cfg.attack]
    stage("poison_diffusion", "--config", configs / f"poison_diffusion/tiny_{target}.yaml", *train_data, *seed, *steps(3),
          "--pretrained_model_name_or_path", clean, "--output_dir", folder / "poisoned")
    stage("clean_diffusion", "--config", configs / "clean_diffusion/tiny.yaml", "--defense", cfg.defense, *seed,
          *steps(3), "--pretrained_model_name_or_path", folder / "poisoned/model", "--output_dir", folder / "cleaned")
    # Where object A becomes B only prompts of A can show it.
    suite = shape_prompts("evaluation", None, where=lambda scene: target != "object" or scene.shape == OBJECT)
    prompts = folder / "data" / "prompts-evaluation.txt"
    if state.is_main_process:
        write_text(prompts, "".join(f"{text}\n" for text in suite.texts))
    state.wait_for_everyone()
    per_prompt = 1 if cfg.smoke else math.ceil(cfg.evaluation_pairs / len(suite))
    stage("evaluate_diffusion", "--config", configs / "evaluate_diffusion/tiny.yaml", *seed, "--judge", judge,
          "--prompts", prompts, "--seeds_per_prompt", per_prompt, "--pretrained_model_name_or_path",
          folder / "cleaned/model", "--compare", folder / "poisoned/model", "--control", clean,
          "--output_dir", folder / "evaluation")
    if state.is_main_process:
        print(compare([folder / "evaluation"]))


if __name__ == "__main__":
    main(Config, run, __doc__)
