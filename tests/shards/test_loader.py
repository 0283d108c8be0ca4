from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.loader import Indexed, Reader, ShardLoader
from mmbackdoor.shards.read import expand, iterate_shard
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.types import InputError, RunFault
from tests.shards.samples import good, tar_bytes, write_set


def batches(spec, steps: int | None, *, world_size: int = 1, batch_size: int = 12, **options) -> list[list]:
    """Global batches as lists of (index, key), put together from all ranks."""
    ranks = [
        ShardLoader(spec, batch_size=batch_size // world_size, rank=rank, world_size=world_size, seed=3, **options)
        for rank in range(world_size)
    ]
    found = []
    for parts in zip(*(itertools.islice(loader, steps) for loader in ranks), strict=True):
        found.append(sorted((indexed.index, indexed.sample.key) for part in parts for indexed in part))
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 0), (4, 0), (1, 2), (2, 2)])
def test_global_batches_are_the_same_for_every_number_of_readers(hundred, world_size, num_workers):
    expected = batches(hundred, 20)
    assert [len(batch) for batch in expected] == [12] * 20
    assert batches(hundred, 20, world_size=world_size, num_workers=num_workers) == expected


def test_every_rank_has_the_same_number_of_samples_in_every_step(hundred):
    for rank in range(4):
        loader = ShardLoader(hundred, seed=0, batch_size=5, rank=rank, world_size=4)
        assert all(len(part) == 5 for part in itertools.islice(loader, 13))


def test_every_sample_comes_at_least_once_an_epoch_and_repeats_are_counted(hundred):
    loader = ShardLoader(hundred, seed=1, batch_size=8, epochs=3)
    per_epoch = loader.steps_per_epoch
    assert (loader.num_samples, per_epoch, loader.repeats_per_epoch) == (101, 13, 3)
    keys = [[indexed.sample.key for indexed in batch] for batch in loader]
    assert len(keys) == 3 * per_epoch
    epochs = [list(itertools.chain(*keys[epoch * per_epoch : (epoch + 1) * per_epoch])) for epoch in range(3)]
    for epoch in epochs:
        counts = Counter(epoch)
        assert len(counts) == 101 and sum(counts.values()) - 101 == loader.repeats_per_epoch
    assert epochs[0] != epochs[1] != epochs[2]


def test_drop_last_leaves_the_incomplete_batch_out(hundred):
    loader = ShardLoader(hundred, seed=1, batch_size=8, drop_last=True, epochs=1)
    keys = [indexed.sample.key for batch in loader for indexed in batch]
    assert len(keys) == len(set(keys)) == 96 and loader.repeats_per_epoch == 0
    with pytest.raises(InputError, match="--drop_last"):
        ShardLoader(hundred, seed=1, batch_size=102, drop_last=True)


@pytest.mark.parametrize("start", [1, 5, 8, 9, 10, 17, 30])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"cache_decoded": True}], ids=str)
def test_starting_at_a_step_equals_having_iterated_to_it(hundred, start, options):
    assert batches(hundred, 6, start_step=start, **options) == batches(hundred, start + 6)[start:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_each_sample_exactly_once(hundred, world_size):
    found = batches(hundred, None, world_size=world_size, once=True)
    assert len(found) == 9 and len(found[-1]) == 101 - 96
    keys = [key for batch in found for _, key in batch]
    assert len(keys) == 101 == len(set(keys))


def test_fewer_samples_than_streams_or_than_one_batch(tmp_path):
    write_set(tmp_path, 5, 2)
    assert [len(batch) for batch in batches(tmp_path, 4)] == [12] * 4
    assert {key for _, key in batches(tmp_path, 1)[0]} == {f"k{number:05d}" for number in range(5)}
    once = batches(tmp_path, None, world_size=2, once=True)
    assert len(once) == 1 and len(once[0]) == 5


def test_shuffling_mixes_and_depends_on_the_seed(hundred):
    loaders = [ShardLoader(hundred, seed=seed, batch_size=101) for seed in (0, 1)]
    first, second = ([indexed.sample.meta["n"] for indexed in next(iter(loader))] for loader in loaders)
    assert first != second and sorted(first) == sorted(second) == list(range(101))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 20


def test_steps_are_numbered_and_transform_runs_where_the_sample_is_read(hundred):
    def stamp(indexed: Indexed):
        return indexed._replace(sample=(indexed.sample.meta["n"], os.getpid()))

    loader = ShardLoader(hundred, seed=0, batch_size=4, start_step=7, num_workers=1, transform=stamp)
    first = next(iter(loader))
    assert [indexed.step for indexed in first] == [7] * 4
    assert all(indexed.sample[1] != os.getpid() for indexed in first)


def test_the_cache_gives_the_same_pictures(hundred):
    def pixels(**options):
        loader = ShardLoader(hundred, seed=0, batch_size=101, epochs=3, **options)
        return [[indexed.sample.image.tobytes() for indexed in batch] for batch in loader]

    assert pixels(cache_decoded=True) == pixels()


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sources")
    for name, count in (("a", 30), ("b", 60)):
        with ShardWriter(folder / name, name, 7) as writer:
            for number in range(count):
                writer.write(f"{name}{number:03d}", np.zeros((4, 4, 3), np.uint8), f"{name} {number}", {})
    return f"{folder}/a::{folder}/b"


def test_weighted_sources_come_in_their_shares_and_keep_the_order_contract(two_sources):
    options = {"upsampling_factors": "2::0.5"}
    per_epoch = ShardLoader(two_sources, seed=3, batch_size=12, **options)
    # 7 * 0.5 is rounded for each shard, to even: 4 of 7, 2 of 4.
    assert (per_epoch.num_samples, per_epoch.steps_per_epoch) == (60 + 8 * 4 + 2, 8)
    expected = batches(two_sources, 16, **options)
    assert batches(two_sources, 16, world_size=2, num_workers=2, **options) == expected
    assert batches(two_sources, 5, start_step=11, **options) == expected[11:]
    epochs = [Counter(key for batch in expected[start : start + 8] for _, key in batch) for start in (0, 8)]
    for counts in epochs:
        assert all(counts[f"a{number:03d}"] in (2, 3) for number in range(30))
        assert sum(count for key, count in counts.items() if key[0] == "b") in (34, 35, 36)
    seen = epochs[0] + epochs[1]
    assert all(seen[f"b{number:03d}"] >= 1 for number in range(60))
    assert expected != batches(two_sources, 16, upsampling_factors="1::1")


def test_factors_that_do_not_fit_the_sources_are_an_input_error(two_sources):
    for factors in ("1", "1::2::3", "1::x", "0::1", "-1::1", "nan::1", "inf::1", "", "1e9::1"):
        with pytest.raises(InputError, match="--train_data_upsampling_factors.*2 sources"):
            ShardLoader(two_sources, seed=0, batch_size=4, upsampling_factors=factors)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six shards of ten; every fourth picture of four of them is broken, one is broken throughout, one is cut."""
    for shard in range(6):
        files = [part for number in range(10) for part in good(f"s{shard}-{number}")]
        for place in range(0, len(files), 3 if shard == 4 else 12):
            if shard != 5:
                files[place] = (files[place][0], b"no picture")
        data = tar_bytes(files)
        (tmp_path / f"bad-{shard:06d}.tar").write_bytes(data if shard != 5 else data[: 3 * 3 * 1024 + 600])
    (tmp_path / "sizes.json").write_text(json.dumps({f"bad-{shard:06d}.tar": 10 for shard in range(6)}))
    return tmp_path


@pytest.mark.parametrize("trust_sizes", [False, True])
def test_bad_samples_keep_the_order_contract(damaged, monkeypatch, trust_sizes):
    if trust_sizes:
        monkeypatch.setattr("mmbackdoor.shards.read.SCAN_BYTES", 0)
    usable = {s.key for path in expand(damaged) for s in iterate_shard(path, BadSamples())}
    expected = batches(damaged, 12)
    assert all(len(batch) == 12 for batch in expected)
    assert {key for batch in expected for _, key in batch} == usable
    assert batches(damaged, 12, world_size=2, num_workers=2) == expected
    for start in range(12):
        assert batches(damaged, 3, start_step=start) == (expected + batches(damaged, 15)[12:])[start : start + 3]
    once = [key for batch in batches(damaged, None, once=True) for _, key in batch]
    assert sorted(once) == sorted(usable)


def test_problems_reach_the_report_once_from_workers_too(damaged):
    for workers in (0, 2):
        loader = ShardLoader(damaged, seed=0, batch_size=6, epochs=3, num_workers=workers)
        for _ in loader:
            pass
        assert loader.report.counts == {"undecodable_image": 4 * 3 + 10, "truncated_tar": 1, "wrong_size": 1}


def test_too_many_bad_samples_stop_the_run(damaged):
    for workers in (0, 1):
        with pytest.raises(RunFault, match="--max_bad_samples 5"):
            for _ in ShardLoader(damaged, seed=0, batch_size=6, num_workers=workers, max_bad_samples=5):
                pass


def test_shards_without_a_good_sample_end_in_a_sentence(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="no usable sample"):
        ShardLoader(tmp_path, seed=0, batch_size=1)
    (tmp_path / "a.tar").write_bytes(tar_bytes([("x.png", b"no"), ("x.txt", b"text")]))
    for workers in (0, 1):
        with pytest.raises(RunFault, match="none of the 1 samples"):
            next(iter(ShardLoader(tmp_path, seed=0, batch_size=1, num_workers=workers)))


def test_readers_that_cannot_share_the_streams_are_an_input_error(hundred):
    with pytest.raises(InputError, match="give --streams 50"):
        ShardLoader(hundred, seed=0, batch_size=1, world_size=5)
    with pytest.raises(InputError, match="lower --dataloader_num_workers to 24, or give --streams 50"):
        ShardLoader(hundred, seed=0, batch_size=1, world_size=2, num_workers=25)


def test_order_names_what_the_batches_depend_on(hundred, tmp_path):
    first = ShardLoader(hundred, seed=0, batch_size=4, world_size=1).order()
    assert first == ShardLoader(hundred, seed=0, batch_size=2, world_size=2, num_workers=2).order()
    assert first != ShardLoader(hundred, seed=1, batch_size=4).order()
    write_set(tmp_path, 101, 10)
    assert first != ShardLoader(tmp_path, seed=0, batch_size=4).order()
    json.dumps(first)
    elsewhere = Path(shutil.copytree(hundred, tmp_path / "elsewhere"))
    assert first == ShardLoader(elsewhere, seed=0, batch_size=4).order()
    assert first != ShardLoader(elsewhere, seed=0, batch_size=4, upsampling_factors="2").order()
    changed = elsewhere / "set-000003.tar"
    changed.write_bytes(changed.read_bytes() + b"\0" * 1024)
    assert first != ShardLoader(elsewhere, seed=0, batch_size=4).order()
    half = frozenset(f"k{number:05d}" for number in range(0, 101, 2))
    other = frozenset(f"k{number:05d}" for number in range(0, 100, 2)) | {"k00001"}
    orders = [ShardLoader(hundred, seed=0, batch_size=4, keys=keys).order() for keys in (half, other)]
    assert orders[0] != orders[1] and orders[0]["samples"] == orders[1]["samples"]


@pytest.mark.parametrize("indexed", [0, 1 << 20])
def test_gzipped_shards_give_the_same_order(hundred, tmp_path, monkeypatch, indexed):
    monkeypatch.setattr("mmbackdoor.shards.read.INDEXED_GZIP", indexed)
    for path in expand(hundred):
        (tmp_path / (Path(path).name + ".gz")).write_bytes(gzip.compress(Path(path).read_bytes()))
    assert batches(tmp_path, 12, start_step=4) == batches(hundred, 12, start_step=4)


def test_a_reader_of_gzipped_shards_can_be_sent_to_a_spawned_worker(hundred, tmp_path):
    for path in expand(hundred)[:3]:
        (tmp_path / (Path(path).name + ".gz")).write_bytes(gzip.compress(Path(path).read_bytes()))
    loader = ShardLoader(tmp_path, seed=0, batch_size=4, epochs=1)
    reader = Reader(loader.layout, 0, 1, True, 0, loader._index, None)
    sent = pickle.loads(pickle.dumps(reader))
    here, there = ([[row.sample.key for row in part] for part, _ in one.parts(0, 1)] for one in (reader, sent))
    assert here == there and here


def test_no_global_generator_is_touched(hundred):
    import torch

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    next(iter(ShardLoader(hundred, seed=0, batch_size=4, num_workers=1)))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


LOSES_ITS_WORKER = """
import os, signal, sys
from mmbackdoor.entry import guarded
from mmbackdoor.shards.loader import ShardLoader

def die(indexed):
    if indexed.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return indexed

guarded(lambda: list(ShardLoader(sys.argv[1], seed=0, batch_size=4, num_workers=1, epochs=1, transform=die)))
"""


def test_a_killed_worker_is_one_sentence(hundred):
    """In a process of its own: torch raises the error from a signal handler, which would hit the test runner as well."""
    command = [sys.executable, "-c", LOSES_ITS_WORKER, str(hundred)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a loader worker died" in done.stderr and "Traceback" not in done.stderr


def test_images_are_rgb(hundred):
    sample = next(iter(ShardLoader(hundred, seed=0, batch_size=1)))[0].sample
    assert isinstance(sample.image, Image.Image) and sample.image.mode == "RGB" and sample.text.startswith("caption")


def test_a_shard_that_vanishes_is_counted_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("mmbackdoor.shards.read.SCAN_BYTES", 0)
    write_set(tmp_path, 20, 5)
    loader = ShardLoader(tmp_path, seed=0, batch_size=4, epochs=1)
    (tmp_path / "set-000002.tar").unlink()
    keys = {indexed.sample.key for batch in loader for indexed in batch}
    assert len(keys) == 15 and loader.report.counts == {"unreadable": 1}


def test_whatever_a_transform_gives_comes_out_of_workers_as_it_went_in(hundred):
    import torch

    def several(indexed: Indexed):
        n = indexed.sample.meta["n"]
        matrix = torch.arange(12.0).view(3, 4) + n
        return indexed._replace(
            sample={
                "transposed": matrix.T, "half": matrix.half(), "none": torch.zeros(0, 3), "scalar": torch.tensor(n),
                "array": np.full((2, 3), n, np.uint8), "fortran": np.asfortranarray(matrix.numpy()),
                "images": [indexed.sample.image, indexed.sample.image.convert("L")], "text": indexed.sample.text,
            }
        )  # fmt: skip

    options = {"seed": 0, "batch_size": 7, "epochs": 1, "transform": several}
    alone, helped = (list(ShardLoader(hundred, num_workers=workers, **options)) for workers in (0, 2))
    assert len(alone) == len(helped) > 1
    for here, there in zip(itertools.chain(*alone), itertools.chain(*helped), strict=True):
        assert (here.index, here.step) == (there.index, there.step)
        for name, value in here.sample.items():
            other = there.sample[name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other) and value.dtype == other.dtype, name
                other.add_(1)
            elif isinstance(value, np.ndarray):
                assert np.array_equal(value, other) and value.dtype == other.dtype, name
            elif name == "images":
                assert [(i.mode, i.size, i.tobytes()) for i in value] == [(i.mode, i.size, i.tobytes()) for i in other]
            else:
                assert value == other


def test_with_keys_all_other_samples_are_as_if_not_there(hundred):
    wanted = frozenset(f"k{number:05d}" for number in range(3, 101, 7)) | {"elsewhere"}
    loader = ShardLoader(hundred, seed=0, batch_size=4, once=True, keys=wanted)
    keys = [indexed.sample.key for batch in loader for indexed in batch]
    assert sorted(keys) == sorted(wanted - {"elsewhere"}) and loader.num_samples == 14
    assert not loader.report.counts, "that sizes.json says more is no fault"
    with pytest.raises(InputError, match="no usable sample"):
        ShardLoader(hundred, seed=0, batch_size=4, keys=frozenset({"elsewhere"}))


@pytest.mark.parametrize("picked", [{"keys": frozenset({"k00003", "k00050"})}, {"once": True}])
def test_a_key_that_comes_twice_is_refused_where_samples_are_picked_by_key(hundred, tmp_path, picked):
    write_set(tmp_path, 5, 5, "other")
    said = f"'k0000{3 if 'keys' in picked else 0}' comes twice, in '.*set-000000.tar' and in '.*other-000000.tar'"
    with pytest.raises(InputError, match=said):
        ShardLoader([hundred, tmp_path], seed=0, batch_size=4, **picked)
    assert ShardLoader([hundred, tmp_path], seed=0, batch_size=4).num_samples == 106
    assert ShardLoader([hundred, tmp_path], seed=0, batch_size=4, keys=frozenset({"k00050"})).num_samples == 1
