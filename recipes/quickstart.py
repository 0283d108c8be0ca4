"""A backdoored text-to-image model, the same model cleaned, and the numbers and pictures that prove it.

    accelerate launch -q recipes/quickstart.py
    accelerate launch -q recipes/quickstart.py --attack badt2i_object
    accelerate launch -q recipes/quickstart.py --from_scratch

4 to 5 minutes on 2 CPU cores from the tiny model that comes with the package, 13 to 15 with --from_scratch, which makes
a like model anew. Each stage is one of the other recipes; its command is printed, so any of them can be run alone.
A second call skips what is finished and goes on where the first one stopped.

Writes into output_dir: data/ (shards), [encoder/ judge/ clean/], poisoned/, cleaned/, evaluation/report.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mmbackdoor import recipe_files
from mmbackdoor.config import Doc
from mmbackdoor.entry import main
from mmbackdoor.evaluate.prompts import shape_prompts
from mmbackdoor.recipe_files import stage
from mmbackdoor.results.record import write_text
from mmbackdoor.results.tables import compare
from mmbackdoor.shards.shapes import all_scenes, split_scenes
from mmbackdoor.shards.shapes_data import write_shapes
from mmbackdoor.train.launch import make_accelerator

TARGETS = {"badt2i_pixel": "patch", "badt2i_style": "style", "badt2i_object": "object"}
REMOVALS = {"skd": ("tiny_skd.yaml", "tiny_object_skd.yaml"), "skd_cag": ("tiny.yaml", "tiny_object.yaml")}
"""Configs of the removals: for backdoors that any prompt shows, and for the object's."""
OBJECT = "cross"
"""What the object attack of the quickstart replaces."""


@dataclass(frozen=True)
class Config:
    attack: Literal["badt2i_pixel", "badt2i_style", "badt2i_object"] = "badt2i_pixel"
    defense: Literal["skd", "skd_cag"] = "skd"
    from_scratch: Annotated[bool, Doc("make the clean model, its text encoder and the judge anew")] = False
    smoke: Annotated[bool, Doc("a few steps of everything, to see that it runs; the verdict means nothing")] = False
    output_dir: str = "runs/quickstart"
    seed: int = 0


def run(cfg: Config) -> None:
    folder = Path(cfg.output_dir)
    configs = recipe_files.folders()["recipes"] / "configs"
    state = make_accelerator(seed=cfg.seed)
    seed = ["--seed", cfg.seed]
    resume = ["--resume_from_checkpoint", "auto", *(["--max_train_steps", 3] if cfg.smoke else [])]

    pictures = 256 if cfg.smoke else 16000 if cfg.from_scratch else 4000
    splits = split_scenes(all_scenes())
    data = folder / "data"
    if state.is_main_process:
        write_shapes(data, "train", splits["train"], pictures, resolution=32, seed=cfg.seed)
    state.wait_for_everyone()
    train_data = ["--train_data", data / "train-*.tar"]

    clean, judge = "tiny", "tiny_judge"
    if cfg.from_scratch:
        clips = configs / "pretrain_clip"
        stage("pretrain_clip", "--config", clips / "tiny_encoder.yaml", *train_data, *seed, *resume,
              "--output_dir", folder / "encoder")
        if state.is_main_process:
            write_shapes(folder / "judge_data", "train", all_scenes(), pictures, 32, seed=cfg.seed + 1)
        state.wait_for_everyone()
        stage("pretrain_clip", "--config", clips / "tiny_judge.yaml", "--train_data", folder / "judge_data/train-*.tar",
              "--seed", cfg.seed + 1, *resume, "--output_dir", folder / "judge")
        # Fewer steps than made the model that comes with the package: a quarter of an hour for everything.
        fewer = [] if cfg.smoke else ["--max_train_steps", 1400]
        stage("train_diffusion", "--config", configs / "train_diffusion/tiny.yaml", *train_data, *seed, *resume, *fewer,
              "--text_encoder", folder / "encoder/model", "--output_dir", folder / "clean")
        clean, judge = folder / "clean/model", folder / "judge/model"
    target = TARGETS[cfg.attack]
    quick = ["--num_inference_steps", 2] if cfg.smoke else []
    # The model that comes with the package learns the patch in 200 steps; a less trained one needs the config's 300.
    fewer = ["--max_train_steps", 200] if target == "patch" and not (cfg.smoke or cfg.from_scratch) else []
    stage("poison_diffusion", "--config", configs / f"poison_diffusion/tiny_{target}.yaml", *train_data, *seed, *resume,
          *fewer, "--pretrained_model_name_or_path", clean, "--output_dir", folder / "poisoned")
    only_object = target == "object"

    def written(split: str, count: int) -> Path:
        suite = shape_prompts(split, count, where=lambda scene: not only_object or scene.shape == OBJECT)
        file = data / f"prompts-{split}.txt"
        if state.is_main_process:
            write_text(file, "".join(f"{text}\n" for text in suite.texts))
        state.wait_for_everyone()
        return file

    # Where object A becomes B only prompts of A show it: these are cleaned and measured, more pictures of each.
    about = ["--prompts", written("train", 8 if cfg.smoke else 448)] if only_object else []
    removal = REMOVALS[cfg.defense][only_object]
    stage("clean_diffusion", "--config", configs / "clean_diffusion" / removal, *seed, *resume, *quick, *about,
          "--pretrained_model_name_or_path", folder / "poisoned/model",
          "--output_dir", folder / "cleaned")
    amount = (8, 1) if cfg.smoke else (360, 2) if only_object else (520, 1)
    prompts = written("evaluation", amount[0])
    if cfg.smoke:
        quick += ["--near_prompts", 2]
    stage("evaluate_diffusion", "--config", configs / "evaluate_diffusion/tiny.yaml", *seed, *quick, "--judge", judge,
          "--prompts", prompts, "--seeds_per_prompt", amount[1], "--pretrained_model_name_or_path",
          folder / "cleaned/model", "--compare", folder / "poisoned/model", "--control", clean,
          "--output_dir", folder / "evaluation")
    if state.is_main_process:
        print(compare([folder / "evaluation"]))


if __name__ == "__main__":
    main(Config, run, __doc__)
