"""Models that come with the package, by the names that users type."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny", "tiny_judge")


def shipped(name: str) -> str:
    """The folder of a model that comes with the package; any other name as it is."""
    if name not in SHIPPED or Path(name).exists():
        return name
    return str(files("mmbackdoor.models").joinpath("weights", name))
