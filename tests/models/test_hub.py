from __future__ import annotations

import threading

import pytest

from mmbackdoor.models import hub
from mmbackdoor.models.diffusion_files import load
from mmbackdoor.types import InputError

NAME = "mmbackdoor-tests/no-such-model"


def test_without_network_one_sentence_names_the_local_folder_way(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="path of its local folder") as caught:
        load(NAME)
    assert NAME in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_that_swallows_packets_is_given_up_within_ten_seconds(monkeypatch):
    """A name lookup or a connection that hangs must not hang the command."""
    assert hub.TIMEOUT_S < 10
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    never = threading.Event()
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: never.wait())
    with pytest.raises(InputError, match="no answer within 0 s.*local folder"):
        load(NAME)
    never.set()


def test_a_cached_model_needs_no_network(monkeypatch, folders):
    asked = []
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(hub.DiffusionPipeline, "download", lambda *_, **__: str(folders("sd")))
    model = load(NAME)
    assert model.source == NAME and not asked


@pytest.mark.parametrize("name", ["", "no slash", "a/b/c", "../up/there"])
def test_names_that_are_neither_path_nor_id(name):
    with pytest.raises(InputError, match="local folder"):
        load(name)
