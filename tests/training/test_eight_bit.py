"""Optimizers with states of eight bits are told by their classes."""

import torchao.optim
from torch.optim import AdamW

from srpo_lightning.training.low_bit import AdamW8bit
from srpo_lightning.training.optimizers import is_eight_bit


class Renamed(AdamW8bit):
    """A class of one's own."""


def test_adam_of_eight_bits_is_told_from_adam_and_from_a_function():
    assert all(map(is_eight_bit, (torchao.optim.AdamW8bit, torchao.optim.Adam8bit, AdamW8bit, Renamed)))
    assert not any(map(is_eight_bit, (AdamW, torchao.optim.AdamW4bit, lambda parameters: AdamW8bit(parameters))))
