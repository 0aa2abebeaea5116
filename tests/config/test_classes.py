"""Classes of a configuration are compared as classes."""

from jsonargparse import Namespace

from srpo_lightning.callbacks import EMA
from srpo_lightning.config.classes import is_class, of_class
from srpo_lightning.training.strategies import ShardedStrategy


class Own(EMA):
    """A class that is derived, under another name."""


def test_a_class_of_ones_own_counts_as_what_it_is_derived_from():
    assert is_class(f"{__name__}.Own", EMA)
    assert is_class("srpo_lightning.callbacks.EMA", EMA)
    assert not is_class("srpo_lightning.callbacks.Report", EMA)
    assert not is_class(f"{__name__}.test_a_class_of_ones_own_counts_as_what_it_is_derived_from", EMA)
    assert is_class("srpo_lightning.training.strategies.ShardedStrategy", ShardedStrategy)


def test_the_configured_classes_of_a_kind_are_found_and_none_in_none():
    ema, other = Namespace(class_path=f"{__name__}.Own"), Namespace(class_path="srpo_lightning.callbacks.Report")
    assert of_class([other, ema], EMA) == [ema]
    assert of_class(None, EMA) == []
