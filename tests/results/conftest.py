from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmbackdoor.results.record import Record
from tests.results.invented import fill, records


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes an invented run folder below `tmp_path`."""

    def make(name: str = "demo", rows: list[Record] | None = None, **how: object) -> Path:
        return fill(tmp_path / name, records() if rows is None else rows, **how)

    return make
