"""Tiny pipelines of the real classes, as for the tests of models."""

from __future__ import annotations

from tests.models.conftest import build, folders, lora_file

__all__ = ["build", "folders", "lora_file"]
