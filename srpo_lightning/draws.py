"""Every random number of training, as a function of (seed, step, rank, purpose).

No hidden state: a resumed run draws what the unbroken run would have drawn, "the same noise on every rank" is one
argument, and a logged sample depends on its own seed alone, whatever the batch or the number of GPUs.
Numbers are drawn on the CPU, so that they are the same on every device.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """The randomness of one training step on one rank.

    Args:
        seed: of the run.
        step: micro-batches since the start of the run.
        rank: of this process.
    """

    seed: int
    step: int = 0
    rank: int = 0

    def generator(self, purpose: str, *, shared: bool) -> torch.Generator:
        """A fresh generator; `shared` makes it the same on every rank."""
        return keyed_generator(self.seed, self.step, 0 if shared else self.rank, purpose)

    def noise(self, shape: Sequence[int], *, shared: bool) -> Tensor:
        """Standard normal noise, float32 on the CPU."""
        return _normal(shape, self.generator("noise", shared=shared))

    def integers(self, purpose: str, low: int, high: int, count: int, *, shared: bool) -> Tensor:
        """`count` integers, uniform on low..high, both ends included; int64 [count]."""
        return torch.randint(low, high + 1, (count,), generator=self.generator(purpose, shared=shared))


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The starting noise of evaluation samples, float32 [len(indices), *shape].

    Each sample's noise is a function of (seed, its own index) and of nothing else.
    """
    return torch.stack([_normal(shape, keyed_generator(seed, "sample", i)) for i in indices])


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of `size` training prompts in one pass over them, int64 [size]."""
    return torch.randperm(size, generator=keyed_generator(seed, "order", epoch))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # The trainer's precision may have made another dtype the default.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
