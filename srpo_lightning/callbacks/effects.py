"""Settings that would be taken and have no effect, or another than is meant: refused by name, before any reading."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from srpo_lightning.callbacks.checkpoint import RunCheckpoint
from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.callbacks.guard import OverOptimizationGuard
from srpo_lightning.callbacks.report import Report
from srpo_lightning.callbacks.samples import SampleLogger
from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.data import PromptData
from srpo_lightning.fingerprint import arguments, described
from srpo_lightning.module import SRPOModule
from srpo_lightning.one_line import nearest
from srpo_lightning.rewards.base import Reward
from srpo_lightning.rewards.weighted import WeightedReward

ADD_TRACKING = "add srpo_lightning.callbacks.RewardTracking to trainer.callbacks"

HOW_IT_RUNS = {"dtype", "cache_size", "gradient_checkpointing", "quantize"}
"""Arguments of rewards that make no other model."""

Kind = TypeVar("Kind", bound=Callback)


def check_effects(command: str, trainer: Trainer, module: SRPOModule, data: PromptData) -> None:
    """Refuse what would be ignored.

    Args:
        command: fit, validate, test or predict.

    Raises:
        ValueError: naming the setting and the cure.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    tracking = _first(callbacks, RewardTracking)
    if tracking is not None and command != "predict":
        _check_judge(tracking, module.reward)
    if command in ("validate", "test") and tracking is None:
        raise ValueError(f"{command} measures nothing without RewardTracking: {ADD_TRACKING}, or draw with `predict`")
    if command == "fit":
        evaluates = trainer.limit_val_batches != 0
        weights = evaluated_weights(_first(callbacks, EMA))
        numbers = tracking.numbers(data.eval_samples_per_prompt) if tracking else []
        names = [f"{kind}/{name}" for kind in weights for name in numbers]
        _check_monitor(_first(callbacks, RunCheckpoint), tracking, names, evaluates)
        _check_guard(_first(callbacks, OverOptimizationGuard), tracking, weights, evaluates)
        _check_report(_first(callbacks, Report), tracking, _first(callbacks, SampleLogger))
        if data.offline_ratio:
            module.objective.check_pictures()
        _check_margin(module)


def evaluated_weights(ema: EMA | None) -> list[str]:
    """Whose samples are measured after training has begun."""
    if ema is None:
        return ["policy"]
    return {"both": ["policy", "ema"], "ema": ["ema"], "policy": ["policy"]}[ema.evaluate]


def _first(callbacks: Iterable[Callback], kind: type[Kind]) -> Kind | None:
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def check_single(callbacks: Iterable[Callback]) -> None:
    """Refuse one of this package's callbacks twice.

    Raises:
        ValueError: naming it.
    """
    counts = Counter(type(callback) for callback in callbacks)
    for kind, count in counts.items():
        if count > 1 and kind.__module__.startswith("srpo_lightning"):
            where = "it is what checkpoint.* sets" if kind is RunCheckpoint else "they would write over each other"
            raise ValueError(f"trainer.callbacks has {kind.__name__} {count} times: {where}; leave one away")


def _check_monitor(
    checkpoint: RunCheckpoint | None, tracking: RewardTracking | None, names: list[str], evaluates: bool
) -> None:
    if checkpoint is None:
        return
    if checkpoint.monitor is None:
        for name, default in (("mode", "max"), ("keep_best", 1)):
            if getattr(checkpoint, name) != default:
                raise ValueError(
                    f"checkpoint.{name} is {getattr(checkpoint, name)}, but without checkpoint.monitor no checkpoint "
                    "is best: set that to a number of RewardTracking, for instance policy/held_out"
                )
        return
    _check_evaluations(f"checkpoint.monitor is {checkpoint.monitor}", tracking, evaluates)
    if checkpoint.monitor not in names:
        own = dict.fromkeys(name.partition("/")[2] for name in names)
        kinds = dict.fromkeys(name.partition("/")[0] for name in names)
        near = nearest(checkpoint.monitor, names) or f": that is {' or '.join(kinds)}, then / and {', '.join(own)}"
        raise ValueError(f"checkpoint.monitor is {checkpoint.monitor}, which RewardTracking does not write{near}")


def _check_guard(
    guard: OverOptimizationGuard | None, tracking: RewardTracking | None, weights: list[str], evaluates: bool
) -> None:
    if guard is None:
        return
    _check_evaluations("OverOptimizationGuard watches evaluations", tracking, evaluates)
    assert tracking is not None
    if guard.weights not in weights:
        raise ValueError(
            f"OverOptimizationGuard.weights is {guard.weights}, whose samples are not evaluated, only those of "
            f"{' and '.join(weights)}: set it to that, or EMA.evaluate to both"
        )
    if guard.max_drift is not None and not tracking.has_features:
        raise ValueError(
            f"OverOptimizationGuard.max_drift is {guard.max_drift}, but the drift is measured by the judge's image "
            f"features, and {type(tracking.judge).__name__} has none: take a ClipReward as judge, or leave it away"
        )


def _check_evaluations(what: str, tracking: RewardTracking | None, evaluates: bool) -> None:
    if tracking is None:
        raise ValueError(f"{what}, which RewardTracking measures, and it is not there: {ADD_TRACKING}")
    if not evaluates:
        raise ValueError(f"{what}, but trainer.limit_val_batches is 0, and nothing is evaluated: leave that away")


def _check_report(report: Report | None, tracking: RewardTracking | None, samples: SampleLogger | None) -> None:
    if report is None:
        return
    if tracking is None:
        raise ValueError(f"Report is made of what RewardTracking measures, and it is not there: {ADD_TRACKING}")
    if samples is None:
        rank_zero_warn(
            "Report will have no pictures: they are SampleLogger's, srpo_lightning.callbacks.SampleLogger in "
            "trainer.callbacks"
        )


def _check_judge(tracking: RewardTracking, reward: Reward) -> None:
    """A judge that is trained against says nothing that the reward does not."""
    trained = {str(_model_of(own)) for own in _parts(reward)}
    names = {"judge": tracking.judge}
    names |= {f"metrics.{name}": own for name, own in tracking.scorers.items() if tracking.held_out.get(name)}
    for name, own in names.items():
        for part in _parts(own):
            if str(_model_of(part)) in trained:
                raise ValueError(
                    f"RewardTracking.{name} is {type(part).__name__}, made of the same as the training reward: it "
                    "rises with it whatever the pictures are like; name another model"
                    + ("" if name == "judge" else ", or leave it out of held_out")
                )


def _parts(reward: Reward) -> Iterator[Reward]:
    if isinstance(reward, WeightedReward):
        for term in reward.terms:
            if term.weight:
                yield from _parts(term.reward)
    else:
        yield reward


def _model_of(reward: Reward) -> Any:
    own = {name: value for name, value in arguments(reward).items() if name not in HOW_IT_RUNS}
    return [type(reward).__qualname__, described(own)]


def _check_margin(module: SRPOModule) -> None:
    margin = getattr(module.objective, "margin", None)
    if margin is not None and margin < 0:
        rank_zero_warn(
            f"model.objective.init_args.margin is {margin}: every reward above it, 0 too, has no gradient; a margin is "
            "the reward that is good enough, for instance 0.7"
        )
