"""Every YAML that is shipped is one that its recipe reads."""

from __future__ import annotations

import pytest

from mmbackdoor import recipe_files

CONFIGS = recipe_files.folders()["recipes"] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_it_validates(path):
    recipe_files.validate(recipe_files.recipe_of(path), ["--config", str(path)])
