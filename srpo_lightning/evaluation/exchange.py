"""What callbacks and the module give each other around an evaluation. It is passed: nobody sets attributes of another.

SRPOModule and RewardTracking ask the callbacks of the trainer by these classes, so the order of callbacks is free.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeAlias, TypeVar

from lightning.pytorch import LightningModule, Trainer

from srpo_lightning.batch import Conditions
from srpo_lightning.evaluation.metrics import Table

Weights: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Puts weights in the policy's place, for as long as the context lasts."""

Kind = TypeVar("Kind")


def callbacks_that(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a trainer that are of a class, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


class Evaluation(NamedTuple):
    """What was measured on the samples of one kind of weights.

    Args:
        table: Numbers of every sample.
        numbers: Numbers of all samples together, by name.
    """

    table: Table
    numbers: dict[str, float]


class Evaluations(NamedTuple):
    """What was measured in one evaluation, on the same prompts from the same noise.

    Args:
        step: Number of optimizer steps before it.
        by_weights: Evaluation of each kind of weights: base, policy and ema, where they are there.
        key: Hash of all that its numbers depend on but the weights; numbers under different ones do not compare.
    """

    step: int
    by_weights: dict[str, Evaluation]
    key: str = ""


class OffersWeights:
    """A callback that has weights to evaluate beside the policy's."""

    def offered_weights(self, module: LightningModule) -> dict[str, Weights | None]:
        """Weights by their name, asked for at each batch; None hides the weights of that name."""
        raise NotImplementedError


class ReadsEvaluations:
    """A callback that is given what RewardTracking has measured, at the end of each evaluation's epoch."""

    def on_evaluation(self, trainer: Trainer, module: LightningModule, evaluations: Evaluations) -> None:
        """Read it, on every rank."""
        raise NotImplementedError


class HasPictures:
    """A callback that may have the pictures of a batch already, so that `predict` passes over it."""

    def has_pictures(self, module: LightningModule, batch: Conditions, weights: Iterable[str]) -> bool:
        """Whether every picture of a batch by these weights is there; the same answer on all ranks."""
        raise NotImplementedError
