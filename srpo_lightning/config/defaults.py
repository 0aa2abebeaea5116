"""What a configuration has without naming it: callbacks that show what a run does, and when evaluations come."""

from inspect import signature
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback

from srpo_lightning import callbacks as package
from srpo_lightning.callbacks import EMA, OverOptimizationGuard, Report, RewardTracking, SampleLogger
from srpo_lightning.config.classes import of_class

USUAL_EVALUATIONS, MOST_EVALUATIONS = 4, 8
"""Evaluations of a run that does not say how many, beside the one before training."""

STEPS_BETWEEN = 50
"""Optimizer steps between evaluations of a run that ends by the clock."""


def complete(settings: Namespace) -> None:
    """Add to the settings of a command, in place, what they leave unsaid. Done twice it changes nothing more.

    Args:
        settings: Settings of a command, its trainer and `default_callbacks` among them.
    """
    trainer = settings.get("trainer")
    if not isinstance(trainer, Namespace):
        return  # which is refused where it matters
    _set_evaluations(trainer)
    if settings.get("default_callbacks"):
        trainer.callbacks = with_defaults(trainer)


def _set_evaluations(trainer: Namespace) -> None:
    """Evaluations count micro-batches, unless epochs have a length; the last one is after the last step."""
    if trainer.get("val_check_interval") is not None or trainer.get("check_val_every_n_epoch") is not None:
        return
    if isinstance(trainer.get("limit_train_batches"), int):
        trainer.check_val_every_n_epoch = 1
        return
    steps, accumulate = trainer.get("max_steps"), trainer.get("accumulate_grad_batches")
    if isinstance(steps, int) and isinstance(accumulate, int):
        trainer.val_check_interval = accumulate * (steps_between(steps) if steps > 0 else STEPS_BETWEEN)


def steps_between(max_steps: int) -> int:
    """Optimizer steps between evaluations, so that the last step is evaluated, about four times in all.

    Where the number of steps has no such part, as a prime number has none, they are evaluated at the end alone.

    Args:
        max_steps: Optimizer steps of the run, 1 or more.
    """
    counts = [count for count in range(2, MOST_EVALUATIONS + 1) if max_steps % count == 0] or [1]
    return max_steps // min(counts, key=lambda count: (abs(count - USUAL_EVALUATIONS), count))


def with_defaults(trainer: Namespace) -> list[Any]:
    """The configured callbacks, and those of the usual ones whose class is not among them.

    Without evaluations, where `trainer.limit_val_batches` is 0, only the average is added. The guard is added where
    there is what it watches: a judge, which has no default, and evaluations while training.

    Args:
        trainer: Settings of the trainer.
    """
    named = trainer.get("callbacks")
    callbacks: list[Any] = list(named) if isinstance(named, list) else [named] if named else []
    if trainer.get("limit_val_batches") != 0:
        following: type[Callback] | None = None
        for kind in (Report, OverOptimizationGuard, RewardTracking, SampleLogger):
            is_wanted = kind is not OverOptimizationGuard or _can_be_guarded(trainer, callbacks)
            if is_wanted and not of_class(callbacks, kind):
                callbacks.insert(_place_before(following, callbacks), _new(kind, callbacks))
            following = kind if is_wanted else following
    if not of_class(callbacks, EMA):
        callbacks.insert(0, _new(EMA, callbacks))  # others write what it has averaged
    return callbacks


def _place_before(following: type[Callback] | None, callbacks: list[Any]) -> int:
    """Where a class goes that stands before another; at the end where there is none."""
    found = of_class(callbacks, following) if following else []
    return callbacks.index(found[0]) if found else len(callbacks)


def _can_be_guarded(trainer: Namespace, callbacks: list[Any]) -> bool:
    """Whether there is a held-out score, and it is measured while training."""
    tracking = of_class(callbacks, RewardTracking)
    has_score = any(own.init_args.get("judge") or own.init_args.get("held_out") for own in tracking)
    if trainer.get("check_val_every_n_epoch") is not None:
        return has_score and isinstance(trainer.get("limit_train_batches"), int)
    between, steps = trainer.get("val_check_interval"), trainer.get("max_steps")
    is_known = isinstance(between, int) and isinstance(steps, int) and steps > 0
    return has_score and not (is_known and between > steps * trainer.accumulate_grad_batches)


def _new(kind: type[Callback], callbacks: list[Any]) -> Namespace:
    """A callback as a parser reads its class_path alone; the guard watches weights that are evaluated."""
    settings = {name: own.default for name, own in signature(kind).parameters.items()}
    shows_averages_alone = any(own.init_args.get("evaluate") == "ema" for own in of_class(callbacks, EMA))
    if kind is OverOptimizationGuard and shows_averages_alone:
        settings["weights"] = "ema"
    return Namespace(class_path=f"{package.__name__}.{kind.__name__}", init_args=Namespace(**settings))
