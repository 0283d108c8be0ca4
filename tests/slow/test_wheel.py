"""A wheel, installed outside of the checkout, has all that the quickstart needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmbackdoor

ROOT = Path(mmbackdoor.__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.network]


def call(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_runs_from_an_installed_wheel(tmp_path):
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("mmbackdoor-*.whl")
    site = tmp_path / "site"
    call(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    path = {"PYTHONPATH": str(site)}
    where = call(sys.executable, "-c", "import mmbackdoor; print(mmbackdoor.__file__)", cwd=tmp_path, **path)
    assert Path(where.strip()).is_relative_to(site)
    call(sys.executable, "-m", "mmbackdoor.cli", "recipes", "work", cwd=tmp_path, **path)
    said = call(sys.executable, "work/recipes/quickstart.py", "--smoke", cwd=tmp_path, **path)
    assert "report:" in said
    assert (tmp_path / "runs/quickstart/evaluation/report.html").is_file()
