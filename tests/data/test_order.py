import functools
import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning.data.order import Order, Pick, Segment, SliceSampler, StepSampler, Stream, streams_of
from srpo_lightning.draws import permutation

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 100))
A, B = (32, 32), (64, 16)


def one_stream(size: int) -> list[Stream]:
    return [Stream(1.0, [(np.arange(size), 1.0)])]


def order(size: int, samples_per_step: int, seed: int, *segments: Segment, window: int | None = None) -> Order:
    return Order(one_stream(size), seed, window, [*segments] or [Segment(0, samples_per_step)])


def rows(sampler: StepSampler, count: int) -> list[int]:
    return [pick.row for batch in itertools.islice(sampler, count) for pick in batch]


@given(SIZES, st.integers(1, 3), st.sampled_from([None, 4]))
def test_each_pass_over_the_stream_is_a_permutation(sizes, num_passes, window):
    size, batch_size, seed = sizes
    own = order(size, batch_size, seed, window=window)
    stream = rows(StepSampler(own, batch_size), num_passes * size)
    for start in range(0, num_passes * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))


@given(SIZES)
def test_a_small_set_is_ordered_by_its_permutation_alone(sizes):
    size, batch_size, seed = sizes
    stream = rows(StepSampler(order(size, batch_size, seed, window=size), batch_size), size)
    assert stream[:size] == permutation(seed, 0, size).tolist()


@given(SIZES, st.integers(0, 30))
def test_starting_anywhere_gives_the_tail_of_the_stream_from_zero(sizes, start):
    size, batch_size, seed = sizes
    own = order(size, batch_size, seed)
    whole = rows(StepSampler(own, batch_size), start + 5)
    assert rows(StepSampler(own, batch_size, start=start), 5) == whole[start * batch_size :]


def mixed(seed: int, samples_per_step: int, *segments: Segment) -> Order:
    """Two sizes of two sources, and pictures."""
    streams = [
        Stream(0.4, [(np.arange(5), 0.3), (np.arange(5, 9), 0.1)], [A]),
        Stream(0.4, [(np.arange(9, 16), 1.0)], [A, B]),
        Stream(0.2, [(np.arange(16, 19), 1.0)], [B], is_real=True),
    ]
    return Order(streams, seed, None, [*segments] or [Segment(0, samples_per_step)])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10), st.integers(0, 50))
def test_the_ranks_together_are_one_rank_with_the_global_batch(world_size, batch_size, start, seed):
    own = mixed(seed, batch_size * world_size)
    for step in range(start, start + 4):
        together = [pick for rank in range(world_size) for pick in own.batch(step, batch_size, rank)]
        assert together == own.batch(step, batch_size * world_size, 0)


@functools.cache
def unbroken(seed: int) -> dict[object, list[int]]:
    """What each stream gives, in order."""
    whole: dict[object, list[int]] = {}
    for pick in itertools.chain.from_iterable(mixed(seed, 1).batch(step, 1, 0) for step in range(420)):
        whole.setdefault((pick.is_real, pick.row < 9), []).append(pick.row)
    return whole


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 2))
def test_resuming_with_other_batches_repeats_nothing_and_leaves_nothing_out(parts, seed):
    """Each part of the run: so many steps of so many samples. What a stream gives in all is what it gives unbroken."""
    starts = list(itertools.accumulate((steps for steps, _ in parts), initial=0))
    segments = [Segment(start, samples) for start, (_, samples) in zip(starts, parts, strict=False)]
    given_: dict[object, list[int]] = {}
    for number, (start, (steps, samples)) in enumerate(zip(starts, parts, strict=False)):
        own = mixed(seed, samples, *segments[: number + 1])
        for step in range(start, start + steps):
            for pick in own.batch(step, samples, 0):
                given_.setdefault((pick.is_real, pick.row < 9), []).append(pick.row)
    for kind, found in given_.items():
        assert found == unbroken(seed)[kind][: len(found)]


def test_a_batch_has_one_size_and_one_kind_and_shares_come_out_exactly():
    own = mixed(3, 4)
    batches = [own.batch(step, 4, 0) for step in range(1000)]
    assert all(len({(pick.size, pick.is_real) for pick in batch}) == 1 for batch in batches)
    kinds = [(batch[0].is_real, batch[0].row < 9) for batch in batches]
    assert [kinds.count(kind) for kind in ((False, True), (False, False), (True, False))] == [400, 400, 200]
    drawn = [batch[0].size for batch, kind in zip(batches, kinds, strict=True) if kind == (False, False)]
    assert drawn.count(A) == drawn.count(B) == 200
    first = [pick.row for batch in batches for pick in batch if pick.row < 9]
    assert sum(row < 5 for row in first) == 1200  # weights 3 : 1


def test_each_source_goes_through_passes_of_its_own():
    own = Order([Stream(1.0, [(np.arange(3), 3.0), (np.arange(3, 13), 1.0)])], 0, None, [Segment(0, 1)])
    drawn = [own.batch(step, 1, 0)[0].row for step in range(40)]
    small, large = [row for row in drawn if row < 3], [row for row in drawn if row >= 3]
    assert all(sorted(small[i : i + 3]) == [0, 1, 2] for i in range(0, 30, 3))
    assert sorted(large) == list(range(3, 13))


def test_passes_and_seeds_are_ordered_differently():
    first, second = rows(StepSampler(order(20, 20, 0), 20), 1), rows(StepSampler(order(20, 20, 0), 20, start=1), 1)
    assert first != second
    assert first != rows(StepSampler(order(20, 20, 1), 20), 1)


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 3))
def test_a_windowed_pass_visits_every_prompt_once(size, window, seed):
    assert sorted(permutation(seed, 0, size, window).tolist()) == list(range(size))


def test_a_windowed_pass_is_local_and_shuffled():
    """A stretch as long as the window comes from about as many blocks as fit into it, in no order."""
    passed = permutation(0, 0, 64 * 64, window=512)
    blocks = passed.view(-1, 512) // 64
    assert all(len(stretch.unique()) == 8 for stretch in blocks)
    assert not torch.equal(passed, passed.sort().values)
    assert (blocks[0].diff() == 0).float().mean() < 0.3


def test_records_go_to_streams_by_their_size_and_keep_their_sources_weight():
    parts = [(np.arange(4), [A, B, A, A], 3.0), (np.arange(4, 6), [None, A], 1.0)]
    a, b, free = streams_of(parts, [B])
    assert [(own.tolist(), weight) for own, weight in a.parts] == [([0, 2, 3], 0.5625), ([5], 0.125)]
    assert [own.tolist() for own, _ in (*b.parts, *free.parts)] == [[1], [4]]
    assert [list(stream.sizes) for stream in (a, b, free)] == [[A], [B], [B]]
    assert [stream.share for stream in (a, b, free)] == [0.6875, 0.1875, 0.125]


GROUPS = st.dictionaries(st.sampled_from([None, A, B]), st.integers(1, 12), min_size=1)


@given(GROUPS, st.integers(1, 5), st.integers(1, 4))
def test_the_ranks_together_evaluate_every_prompt_and_each_equally_many(groups, batch_size, world_size):
    numbers = itertools.count()
    given_ = {size: list(itertools.islice(numbers, count)) for size, count in groups.items()}
    samplers = [SliceSampler(given_, batch_size, rank, world_size) for rank in range(world_size)]
    seen = [[pick for batch in sampler for pick in batch] for sampler in samplers]
    assert {pick for own in seen for pick in own} == {Pick(n, size) for size, own in given_.items() for n in own}
    assert len({len(own) for own in seen}) == 1
    assert sum(map(len, seen)) < sum(groups.values()) + world_size * len(groups)
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
    assert all(len({pick.size for pick in batch}) == 1 and len(batch) <= batch_size for batch in samplers[0])


def test_batches_that_are_repeated_are_the_same_ones_also_from_the_middle():
    own = order(20, 4, 0)
    once, twice = rows(StepSampler(own, 4), 5), rows(StepSampler(own, 4, repeats=2), 10)
    assert twice == [row for start in range(0, 20, 4) for row in once[start : start + 4] * 2]
    assert rows(StepSampler(own, 4, start=3, repeats=2), 7) == twice[12:]
