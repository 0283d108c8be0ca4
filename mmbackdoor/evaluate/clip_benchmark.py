"""Results in the JSON form of CLIP_benchmark (github.com/LAION-AI/CLIP_benchmark), for `clip_benchmark build *.json`.

One file for each model and task, with the keys dataset, model, pretrained, task, metrics and language. Of clean
pictures only: its schema has no triggered ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmbackdoor.evaluate.metrics.retrieval import RANKS
from mmbackdoor.results.record import Record, write_text

TASKS = {
    "zeroshot_classification": {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"},
    "zeroshot_retrieval": {
        name: name for k in RANKS for name in (f"image_retrieval_recall@{k}", f"text_retrieval_recall@{k}")
    },
}
FOLDER = "clip_benchmark"


def dump(records: Sequence[Record], model: str, task: str, source: str) -> dict[str, Any] | None:
    """The content of one file, `None` where nothing of the task was measured. `source`: what the model was loaded from."""
    names = TASKS[task]
    mine = [record for record in records if record.model["id"] == model and record.condition == "clean"]
    metrics = {names[record.metric]: record.value for record in mine if record.metric in names}
    if not metrics:
        return None
    return {
        "dataset": mine[0].suite["name"],
        "model": source,
        "pretrained": mine[0].model["sha256"] or "",
        "task": task,
        "metrics": metrics,
        "language": "en",
    }


def write(folder: Path, records: Sequence[Record], sources: dict[str, str]) -> list[Path]:
    """`folder/clip_benchmark/<model>-<task>.json` of the models in `sources` (id -> what it was loaded from)."""
    written = []
    for model, source in sources.items():
        for task in TASKS:
            content = dump(records, model, task, source)
            if content is not None:
                written.append(folder / FOLDER / f"{model}-{task}.json")
                write_text(written[-1], json.dumps(content, indent=1) + "\n")
    return written
