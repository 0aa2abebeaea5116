"""Which prompts the batch of a step holds: a function of (seed, step, rank)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

from srpo_lightning.batch import Size
from srpo_lightning.draws import Shares, permutation

Rows = npt.NDArray[np.int64]


class Pick(NamedTuple):
    """One sample of a batch.

    Args:
        row: of its record.
        size: of its picture; None: the policy's own.
        is_real: whether the record's real picture is what is trained on.
    """

    row: int
    size: Size | None = None
    is_real: bool = False


class Stream(NamedTuple):
    """What one batch is drawn from: records whose pictures have one size.

    Args:
        share: of all batches.
        parts: the rows of each source with its weight.
        sizes: one of these at a time; empty: the policy's own.
        is_real: see `Pick`.
    """

    share: float
    parts: Sequence[tuple[Rows, float]]
    sizes: Sequence[Size] = ()
    is_real: bool = False


class Segment(NamedTuple):
    """A part of a run in which the number of samples per step was the same.

    Args:
        step: the first.
        samples_per_step: over all ranks.
    """

    step: int
    samples_per_step: int


class Order:
    """The samples of every step of a run.

    Steps go to streams by their shares, the samples of a stream to its sources by weight, and each source is passed
    through in an order of its own per pass, in which none of its records comes twice and none is left out. Sample
    number n of the run, counted over all ranks, is the same on any number of ranks; after a resume with another number
    of samples per step every stream goes on behind its last sample.

    Args:
        streams: with rows that are not empty.
        seed: of the run.
        window: see `permutation`.
        segments: the last one is the present.
    """

    def __init__(self, streams: Sequence[Stream], seed: int, window: int | None, segments: Sequence[Segment]) -> None:
        self.streams, self.seed, self.window, self.segments = streams, seed, window, segments
        self._steps = Shares([stream.share for stream in streams], seed, "streams")
        self._sources = [
            Shares([weight for _, weight in stream.parts], seed, "sources", number)
            for number, stream in enumerate(streams)
        ]
        self._sizes = [
            Shares([1.0] * len(stream.sizes), seed, "sizes", number) if stream.sizes else None
            for number, stream in enumerate(streams)
        ]
        self._pass = lru_cache(maxsize=2 * sum(len(stream.parts) for stream in streams))(self._new_pass)

    def description(self) -> Iterator[str]:
        """What the order is a function of, beside the segments and what the records hold."""
        yield f"{self.seed} {self.window}"
        for stream in self.streams:
            yield f"{stream.share} {stream.sizes} {stream.is_real}"
            for rows, weight in stream.parts:
                yield f"{weight} {hashlib.sha256(rows.tobytes()).hexdigest()}"

    def batch(self, step: int, batch_size: int, rank: int) -> list[Pick]:
        """The samples of a rank."""
        number, turn = self._steps.at(step)
        stream, sizes = self.streams[number], self._sizes[number]
        size = stream.sizes[sizes.at(turn)[0]] if sizes else None
        first = self._samples_before(step, number) + rank * batch_size
        return [Pick(self._row(number, n), size, stream.is_real) for n in range(first, first + batch_size)]

    def _samples_before(self, step: int, stream: int) -> int:
        ends = [*(segment.step for segment in self.segments[1:]), step]
        turns = [
            (self._steps.before(min(end, step), stream) - self._steps.before(segment.step, stream))
            * segment.samples_per_step
            for segment, end in zip(self.segments, ends, strict=True)
        ]
        return sum(turns)

    def _row(self, stream: int, n: int) -> int:
        source, own = self._sources[stream].at(n)
        rows = self.streams[stream].parts[source][0]
        epoch, position = divmod(own, len(rows))
        return int(rows[int(self._pass(stream, source, epoch)[position])])

    def _new_pass(self, stream: int, source: int, epoch: int) -> Tensor:
        purpose = f"order/{stream}/{source}" if stream or source else "order"
        return permutation(self.seed, epoch, len(self.streams[stream].parts[source][0]), self.window, purpose)


class StepSampler(Sampler[list[Pick]]):
    """Endless batches: that of each step from `start` on, each several times.

    Args:
        order: of the run.
        batch_size: per rank.
        rank: of this process.
        start: batches already handed out; whoever hands them out keeps it up to date, for the epochs that follow.
        repeats: how often each step's is.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, start: int = 0, repeats: int = 1) -> None:
        self.order, self.batch_size, self.rank, self.start, self.repeats = order, batch_size, rank, start, repeats

    def __iter__(self) -> Iterator[list[Pick]]:
        step = self.start
        while True:
            yield self.order.batch(step // self.repeats, self.batch_size, self.rank)
            step += 1


class SliceSampler(Sampler[list[Pick]]):
    """Rank r's share of the evaluation prompts of each size: r, r + world_size, ...

    Every rank gets equally many (collective operations would hang otherwise): the first prompts of a size fill the gap,
    and a metric over several ranks counts those few twice.

    Args:
        rows: the prompts of each size.
        batch_size: per rank.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, rows: Mapping[Size | None, Sequence[int]], batch_size: int, rank: int, world_size: int) -> None:
        self.batches: list[list[Pick]] = []
        for size, group in rows.items():
            own = [Pick(group[(rank + i * world_size) % len(group)], size) for i in range(-(-len(group) // world_size))]
            self.batches += [own[start : start + batch_size] for start in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Pick]]:
        yield from self.batches


def streams_of(parts: Sequence[tuple[Rows, Sequence[Size | None], float]], sizes: Sequence[Size]) -> list[Stream]:
    """Streams of one kind of record, by size; their shares add up to 1.

    Args:
        parts: of each source the rows, each record's own size or None, and the weight.
        sizes: for records without one of their own; empty: the policy's.
    """
    total = sum(weight for _, _, weight in parts)
    grouped: dict[Size | None, list[tuple[Rows, float]]] = {}
    for rows, own, weight in parts:
        for size in dict.fromkeys(own):
            chosen = rows[np.array([other == size for other in own])] if len(set(own)) > 1 else rows
            grouped.setdefault(size, []).append((chosen, weight / total * len(chosen) / len(rows)))
    return [
        Stream(sum(weight for _, weight in group), group, sizes if size is None else (size,))
        for size, group in grouped.items()
    ]
