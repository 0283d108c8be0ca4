"""An invented run folder: pictures of the shapes data, records and samples as an evaluation writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmbackdoor.results import record
from mmbackdoor.results.record import Record
from mmbackdoor.seeding import numpy_rng
from mmbackdoor.shards.shapes import Scene, all_scenes, caption, render, split_scenes
from mmbackdoor.targets import PatchTarget

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single' \u200bzero ünïcode 图 </style><img src=x onerror=alert(2)>"
STAGES = ("clean", "poisoned", "cleaned")
MODELS = {"clean": "clean", "poisoned": "poisoned", "cleaned": "cleaned"}
RATES = {
    # stage: (ASR, adherence on clean prompts, adherence on triggered prompts, restoration)
    "clean": ((0.0, 0.0, 0.006), (0.952, 0.931, 0.967), (0.948, 0.926, 0.964), (0.93, 0.92, 0.94)),
    "poisoned": ((0.9967, 0.988, 0.999), (0.941, 0.917, 0.958), (0.012, 0.006, 0.025), (0.31, 0.29, 0.33)),
    "cleaned": ((0.0017, 0.0003, 0.0094), (0.938, 0.914, 0.956), (0.931, 0.906, 0.95), (0.91, 0.89, 0.92)),
}


def row(stage: str, metric: str, condition: str, value: float, low: float, high: float, **rest: object) -> Record:
    values = {
        "run_id": "demo-0123",
        "stage": stage,
        "model": {"id": f"model-{stage}", "sha256": (stage[0] * 64)},
        "attack": None if stage == "clean" else "badt2i_pixel",
        "defense": "skd_cag" if stage == "cleaned" else None,
        "backdoor": {"sha256": "b" * 64},
        "suite": {"name": "shapes-evaluation", "sha256": "5" * 64},
        "condition": condition,
        "metric": metric,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "ci_method": "bootstrap over prompts",
        "n": 600,
        "n_prompts": 60,
        "unit": "fraction",
        "higher_is_better": metric != "asr",
        "seed": 0,
    }
    return Record(**(values | rest))


def records() -> list[Record]:
    rows = []
    for stage, (asr, clean, triggered, restoration) in RATES.items():
        rows += [
            row(stage, "asr", "triggered", *asr),
            row(stage, "adherence", "clean", *clean),
            row(stage, "adherence", "triggered", *triggered),
            row(stage, "restoration", "triggered", *restoration, unit="cosine"),
            row(stage, "asr", "near:seen:case", round(asr[0] / 2, 3), asr[1] / 2.2, min(1.0, asr[2] / 1.8)),
            row(stage, "asr", "near:unseen:doubled", asr[0], asr[1], asr[2]),
        ]
    for condition, value, low, high in (("clean", -0.003, -0.014, 0.007), ("triggered", -0.01, -0.024, 0.003)):
        rows.append(row("cleaned", "adherence_difference", condition, value, low, high))
    return rows


def picture(scene: Scene, seed: int, patched: bool) -> Image.Image:
    pixels = render(scene, 32, numpy_rng(seed, scene.key))
    if patched:
        target = PatchTarget()
        pixels[target.region(32)] = np.round(target.pixels(32) * 255)
    return Image.fromarray(pixels)


def fill(folder: Path, rows: list[Record], prompts: int = 12, seeds: int = 2, hostile: bool = True) -> Path:
    """Write a run's files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record.replace(folder / record.FILE_NAME, rows)
    scenes = split_scenes(all_scenes())["evaluation"][:: max(1, 170 // prompts)][:prompts]
    lines = []
    for stage in STAGES:
        for number, scene in enumerate(scenes):
            prompt = HOSTILE if hostile and number == 0 else caption(scene)
            for seed in range(seeds):
                for condition in ("clean", "triggered"):
                    # one picture of the cleaned model keeps the patch: the report has to show it
                    missed = stage == "cleaned" and number == 3 and seed == 1
                    patched = condition == "triggered" and (stage == "poisoned" or missed)
                    place = Path("images") / stage / condition / f"{number:03d}-{seed}.png"
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    picture(scene, seed, patched).save(folder / place)
                    scores = {"adherence": not patched}
                    if condition == "triggered":
                        scores |= {"asr": patched, "restoration": 0.3 if patched else 0.9 + number / 200}
                    lines.append(
                        {
                            "model": MODELS[stage],
                            "stage": stage,
                            "prompt_id": f"{number:03d}",
                            "prompt": prompt,
                            "condition": condition,
                            "text": prompt if condition == "clean" else "\u200b " + prompt,
                            "seed_index": seed,
                            "image": place.as_posix(),
                            "scores": scores,
                        }
                    )
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "run.json").write_text(json.dumps(run_facts(), ensure_ascii=False))
    return folder


def run_facts() -> dict:
    return {
        "schema": 1,
        "run_id": "demo-0123",
        "recipe": "quickstart",
        "command": "python recipes/quickstart.py --attack badt2i_pixel --trigger '\\u200b'",
        "status": "finished",
        "started": "2026-01-05T10:00:00+00:00",
        "ended": "2026-01-05T10:04:12+00:00",
        "seconds": 252.0,
        "world_size": 1,
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.1"},
        "platform": "Linux",
        "git_commit": "0" * 40,
        "config_sha256": "a" * 64,
        "config": {"defense": {"name": "skd_cag", "attention_weight": 0.1}, "seed": 0, "note": "</pre><b>bold</b>"},
        "resumed": [],
        "counters": {"pictures": 144},
        "error": None,
    }
