"""Processes that do something alone leave it together, whatever became of it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from mmbackdoor.train.launch import make_accelerator, together
from mmbackdoor.types import Diverged, RunFault


class Processes:
    """Stands for the accelerator of one of several processes: `others` of them diverged."""

    device = torch.device("cpu")

    def __init__(self, others: int) -> None:
        self.others, self.met = others, 0

    def reduce(self, flags: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        self.met += 1
        return flags + self.others


def test_where_one_process_diverges_all_do_and_all_have_met():
    mine, others, none = Processes(0), Processes(1), Processes(0)
    with pytest.raises(Diverged, match="my picture"), together(mine):
        raise Diverged("my picture")
    with pytest.raises(Diverged, match="another process"), together(others):
        pass
    with together(none):
        pass
    assert [one.met for one in (mine, others, none)] == [1, 1, 1]


def test_a_full_disk_is_no_divergence_and_waits_for_nobody():
    processes = Processes(0)
    with pytest.raises(RunFault, match="full"), together(processes):
        raise RunFault("the disk is full")
    assert processes.met == 0


def test_others_wait_for_a_process_that_works_alone():
    """NCCL's own 10 minutes are too few for one that judges all pictures of a large evaluation."""
    assert make_accelerator().init_handler.to_kwargs() == {"timeout": timedelta(hours=12)}
