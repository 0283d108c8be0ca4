from __future__ import annotations

from pathlib import Path

import pytest

from tests.shards.samples import write_set


@pytest.fixture(scope="session")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("hundred"), 101, 9)
