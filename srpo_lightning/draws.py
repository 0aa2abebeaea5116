"""Every random number of training, as a function of (seed, step, sample, purpose).

No hidden state: a resumed run draws what the unbroken run would have drawn, also on another number of ranks. "The same
noise for every sample" is one argument. A logged sample depends on its own seed alone, whatever the batch. Numbers are
drawn on the CPU, so that they are the same on every device.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Number of prompts that the order of a large set keeps in one stretch."""

MAX_PERIOD = 1000
"""Largest number of turns in which choices by weight come out exactly, unless one of them is rarer."""

LONGEST_PERIOD = 100_000
"""Number of turns in which the rarest choice comes once at least."""


class Draws(NamedTuple):
    """The randomness of one micro-batch of an optimizer step.

    A step's samples are counted over its micro-batches and ranks, in the order in which they are drawn from the data.
    Sample j of rank r in micro-batch m is number (m R + r) B + j. So 1 rank with 32 micro-batches and 8 ranks with 4
    draw the same for the same 32 samples. Source: the official script, which draws the noise and the
    control words once per optimizer step, and a position for every sample.

    Args:
        seed: Seed of the run.
        step: Number of optimizer steps since the start of the run.
        rank: Rank of this process; ranks that share samples count as one.
        micro_batch: Number of the micro-batch within the step, from 0.
        num_ranks: Number R of processes of the run, counted likewise.
    """

    seed: int
    step: int = 0
    rank: int = 0
    micro_batch: int = 0
    num_ranks: int = 1

    def noise(self, shape: Sequence[int], *, shared: bool, purpose: str = "noise") -> Tensor:
        """Standard normal noise, float32 [B, ...] on the CPU; `shared` gives every sample of the step the same."""
        return self._each(shape[0], purpose, shared, lambda generator: _normal(shape[1:], generator))

    def integers(self, purpose: str, low: int, high: int, count: int, *, shared: bool) -> Tensor:
        """An integer for each of B = `count` samples, uniform on low..high, both ends included; int64 [B]."""
        return self._each(count, purpose, shared, lambda g: torch.randint(low, high + 1, (), generator=g))

    def order(self, purpose: str, size: int, count: int) -> Tensor:
        """The numbers 0..size - 1 in an order of its own for each of B = `count` samples; int64 [B, size]."""
        return self._each(count, purpose, False, lambda generator: torch.randperm(size, generator=generator))

    def choice(self, purpose: str, low: int, high: int) -> int:
        """An integer for the whole micro-batch, uniform on low..high, both ends included; the same on every rank."""
        return int(torch.randint(low, high + 1, (), generator=self._shared_generator(purpose)))

    def subset(self, purpose: str, weights: Sequence[float], count: int) -> list[int]:
        """`count` different places among `weights`, drawn in proportion to them, for the whole micro-batch; sorted.

        They are the same on every rank: ranks that share the policy's weights run the same steps.
        """
        drawn = torch.multinomial(
            torch.tensor(weights, dtype=torch.float64), count, generator=self._shared_generator(purpose)
        )
        return sorted(drawn.tolist())

    def shares(self, purpose: str, concentration: Sequence[float]) -> list[float]:
        """Positive numbers that sum to 1, by Dirichlet's distribution, for the whole micro-batch, on every rank."""
        drawn = np.random.default_rng(self._shared_generator(purpose).initial_seed()).dirichlet(concentration)
        return [float(share) for share in drawn]

    def _shared_generator(self, purpose: str) -> torch.Generator:
        key = (purpose, self.micro_batch) if self.micro_batch else (purpose,)
        return keyed_generator(self.seed, self.step, "all", *key)

    def _each(self, count: int, purpose: str, shared: bool, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        first = (self.micro_batch * self.num_ranks + self.rank) * count
        samples: Sequence[int | str] = ["all"] * count if shared else range(first, first + count)
        drawn = {s: draw(keyed_generator(self.seed, self.step, s, purpose)) for s in dict.fromkeys(samples)}
        return torch.stack([drawn[s] for s in samples])


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], own_seeds: Sequence[int | None] | None = None
) -> Tensor:
    """The starting noise of evaluation samples, float32 [len(indices), *shape].

    Each sample's noise is a function of (seed, its own index) alone, or of its own seed where it has one.
    """
    own = own_seeds or [None] * len(indices)
    keys: list[tuple[int | str, ...]] = [
        (seed, "sample", i) if s is None else ("own seed", s) for i, s in zip(indices, own, strict=True)
    ]
    return torch.stack([_normal(shape, keyed_generator(*key)) for key in keys])


def permutation(seed: int, epoch: int, size: int, window: int | None = None, purpose: str = "order") -> Tensor:
    """The order of `size` training prompts in one pass over them, int64 [size].

    Args:
        seed: Seed of the run.
        epoch: Number of the pass, from 0.
        size: Number of prompts.
        window: Number of prompts that are shuffled at once; None shuffles all. Larger sets are shuffled in two stages:
            the order of blocks of `BLOCK` prompts, then each stretch of `window` prompts. So prompts that lie together
            are drawn at about the same time, and reading stays local.
        purpose: Name that tells several sets of one run apart.
    """
    generator = keyed_generator(seed, purpose, epoch)
    if window is None or size <= window:
        return torch.randperm(size, generator=generator)
    blocks = torch.arange(size).split(BLOCK)
    rows = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()])
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in rows.split(window)])


class Shares:
    """A choice at every turn, by weight: random in order, exact in number over each period.

    The choice of turn n, and how often it was chosen before, are functions of (weights, key, n).

    Args:
        weights: Weights of the choices, positive.
        key: Key of the random numbers.
    """

    def __init__(self, weights: Sequence[float], *key: int | str) -> None:
        assert min(weights) > 0, weights
        self.key = key
        self.counts = _whole_numbers(weights)
        self.period = sum(self.counts)
        self._turns: tuple[int, Tensor] | None = None

    def at(self, n: int) -> tuple[int, int]:
        """The choice of turn n, and how many turns before had the same."""
        if len(self.counts) == 1:
            return 0, n
        number, place = divmod(n, self.period)
        turns = self._period(number)
        choice = int(turns[place])
        return choice, number * self.counts[choice] + int((turns[:place] == choice).sum())

    def before(self, n: int, choice: int) -> int:
        """How many of the first n turns had this choice."""
        if len(self.counts) == 1:
            return n
        number, place = divmod(n, self.period)
        return number * self.counts[choice] + int((self._period(number)[:place] == choice).sum())

    def _period(self, number: int) -> Tensor:
        if self._turns is None or self._turns[0] != number:
            choices = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
            shuffled = choices[torch.randperm(self.period, generator=keyed_generator(*self.key, number))]
            self._turns = number, shuffled
        return self._turns[1]


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, or those of about `MAX_PERIOD` turns that come nearest.

    Where a choice is rarer than that, there are as many turns as it comes once in.
    """
    total = sum(weights)
    for period in range(len(weights), MAX_PERIOD + 1):
        counts = [weight / total * period for weight in weights]
        if all(abs(count - round(count)) < 1e-6 * period and round(count) for count in counts):
            return [round(count) for count in counts]
    period = min(max(MAX_PERIOD, math.ceil(total / min(weights))), LONGEST_PERIOD)
    return [max(1, round(weight / total * period)) for weight in weights]


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # The trainer's precision may have made another dtype the default.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
