"""Pipelines by hub id: the local cache first, then the network, and a quick answer where there is none."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from mmbackdoor.types import InputError

TIMEOUT_S = 6.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def download(name: str, revision: str | None, variant: str | None, allow_pt_weights: bool) -> Path:
    """The local folder of the hub model `name`, downloaded where it is not cached. Raises `InputError`."""
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name!r} is neither a local folder or file nor a hub id (owner/name); check the path")
    options = {"revision": revision, "variant": variant, "use_safetensors": None if allow_pt_weights else True}
    try:
        return Path(DiffusionPipeline.download(name, local_files_only=True, **options))
    except Exception:
        pass
    problem = _unreachable(name, revision)
    if problem is None:
        try:
            return Path(DiffusionPipeline.download(name, **options))
        except Exception as error:
            problem = _first_line(error)
    raise InputError(
        f"the hub model {name!r} could not be downloaded ({problem}); if it lies on this machine, "
        "give the path of its local folder (with model_index.json) instead"
    )


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked about `name`, or None; within `TIMEOUT_S`, even where resolving names hangs."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
            answer.append(None)
        except Exception as error:
            answer.append(_first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answer[0] if answer else f"no answer within {TIMEOUT_S:.0f} s"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
