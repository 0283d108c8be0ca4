from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmbackdoor.seeding import python_rng
from mmbackdoor.shards.order import Circle, epoch_pieces, first_element, reader_streams, shuffled, stretch


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_stretches_cover_the_circle_once_and_evenly(total, streams, epoch):
    parts = [stretch(total, streams, stream, seed=5, epoch=epoch) for stream in range(streams)]
    positions = [(part.start + step) % total for part in parts[:total] for step in range(part.length)]
    assert sorted(positions) == list(range(total))
    lengths = [part.length for part in parts[:total]]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
    assert all(part.length == 1 for part in parts[total:])


@given(st.integers(0, 200), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_shuffled_is_a_permutation_within_its_buffer(length, buffer):
    order = list(shuffled(length, buffer, python_rng(0, length)))
    assert sorted(order) == list(range(length))
    assert all(element < place + buffer for place, element in enumerate(order))


@given(st.integers(0, 500), st.integers(1, 60), st.data())
def test_first_element_is_the_first_at_or_after_the_slot(slot, streams, data):
    stream = data.draw(st.integers(0, streams - 1))
    element = first_element(slot, streams, stream)
    assert element * streams + stream >= slot
    assert element == 0 or (element - 1) * streams + stream < slot


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.integers(1, 4))
def test_every_stream_has_one_reader_and_ranks_follow_the_slot(world_size, workers):
    readers = [
        reader_streams(48, rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)
    ]
    assert sorted(stream for some in readers for stream in some) == list(range(48))
    for number, some in enumerate(readers):
        assert all(stream % world_size == number // workers for stream in some)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any), st.data())
def test_the_circle_is_walked_once_round(sizes, data):
    position = data.draw(st.integers(0, sum(sizes) - 1))
    pieces = epoch_pieces(sizes, 1, 2)
    circle = Circle(pieces)
    everything = [(shard, number) for shard, start, stop in pieces for number in range(start, stop)]
    walked = [(shard, number) for shard, start, stop in circle.walk(position) for number in range(start, stop)]
    assert walked == everything[position:] + everything[:position]


def test_shard_order_is_a_function_of_seed_and_epoch():
    sizes = [1] * 20
    assert epoch_pieces(sizes, 0, 0) == epoch_pieces(sizes, 0, 0)
    assert len({tuple(epoch_pieces(sizes, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert [piece.shard for piece in epoch_pieces(sizes, 0, 0, shuffle=False)] == list(range(20))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 2.25, 3.3]))
def test_a_weight_gives_every_sample_its_share(sizes, weight):
    """Over 120 epochs every sample comes as often as any other of its shard, up to one time."""
    for shard, size in enumerate(sizes):
        alone = [size if number == shard else 0 for number in range(len(sizes))]
        counts = [0] * size
        for epoch in range(120):
            pieces = epoch_pieces(alone, 7, epoch, weights=[weight] * len(sizes))
            assert sum(piece.stop - piece.start for piece in pieces) == round(weight * size)
            for _, start, stop in pieces:
                for number in range(start, stop):
                    counts[number] += 1
        assert not counts or max(counts) - min(counts) <= 1
