"""Every kind of hostile file at once: through the loader, its workers and the checker; none stops them, all count."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from mmbackdoor.shards.bad import KINDS
from mmbackdoor.shards.check import check
from mmbackdoor.shards.loader import ShardLoader
from tests.shards.samples import good, tar_bytes
from tests.shards.test_read import DAMAGED, HOSTILE

PICKLED = {name: {"pickled_member": 1} for name in ("x.pkl", "x.pyd", "x.pt")}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> tuple[Path, dict[str, dict[str, int] | None]]:
    """A shard for each kind, plain and gzipped, each hostile sample between two good ones."""
    folder = tmp_path_factory.mktemp("hostile")
    expected: dict[str, dict[str, int] | None] = {}

    def add(name: str, data: bytes, counts: dict[str, int] | None) -> None:
        file = f"set-{len(expected):06d}.tar"
        (folder / file).write_bytes(data)
        expected[file] = counts

    for name, (files, counts) in HOSTILE.items():
        first = "ok0" if name == "duplicate" else f"ok0-{name}"
        whole = tar_bytes([*good(first), *files, *good(f"ok1-{name}")])
        add(name, whole, counts)
        add(f"{name} gz", gzip.compress(whole), counts)
    for name, (data, _, counts) in DAMAGED.items():
        add(name, data, counts)
    for name, counts in PICKLED.items():
        add(name, tar_bytes([*good(f"ok-{name[2:]}"), (name, b"\x80\x04."), *good(f"ok2-{name[2:]}")]), counts)
    return folder, expected


def test_there_are_more_than_forty_kinds(kinds):
    assert len(HOSTILE) + len(DAMAGED) + len(PICKLED) >= 60
    reported = {kind for counts in kinds[1].values() for kind in counts or ()}
    assert reported <= KINDS.keys() and len(reported) >= 20


def test_the_checker_finds_all_in_parallel_and_names_shard_and_key(kinds):
    folder, expected = kinds
    report = check(folder, 2)
    found: dict[str, Counter] = {name: Counter() for name in expected}
    for some in report.problems.examples.values():
        for problem in some:
            found[Path(problem.shard).name][problem.kind] += 1
    for name, counts in expected.items():
        if counts is None:
            assert found[name], name
        elif counts != {"missing_caption": 1}:
            # A picture with a class but without a caption is fine for evaluation.
            assert found[name] == counts, name
    problems = [problem for some in report.problems.examples.values() for problem in some]
    for problem in problems:
        assert Path(problem.shard).name in str(problem) and ascii(problem.key)[1:-1] in str(problem)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_reads_on_and_counts_all(kinds, workers):
    folder, expected = kinds
    loader = ShardLoader(folder, seed=0, batch_size=16, num_workers=workers, epochs=1)
    keys = {indexed.sample.key for batch in loader for indexed in batch}
    usable = {f"ok0-{name}" for name in HOSTILE if name != "duplicate"} | {f"ok1-{name}" for name in HOSTILE}
    assert usable <= keys
    wanted = Counter()
    for counts in expected.values():
        wanted.update(counts or {})
    assert all(loader.report.counts.get(kind, 0) >= count for kind, count in wanted.items())
    content = json.loads(json.dumps(loader.report.to_dict()))
    assert content["total"] == loader.report.total >= len(expected) - 2
