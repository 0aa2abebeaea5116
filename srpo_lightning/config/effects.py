"""Settings that would be taken and have no effect, or another than is meant: refused by name, before any reading."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher  # no public name tells processes apart
from lightning.pytorch.utilities import rank_zero_warn

from srpo_lightning.callbacks.checkpoint import RunCheckpoint
from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.callbacks.guard import OverOptimizationGuard, stays_lowered
from srpo_lightning.callbacks.report import Report
from srpo_lightning.callbacks.samples import SampleLogger
from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.data import PromptData
from srpo_lightning.files.fingerprint import arguments, described
from srpo_lightning.module import SRPOModule
from srpo_lightning.rewards.base import Reward
from srpo_lightning.rewards.weighted import WeightedReward
from srpo_lightning.suggestions import nearest
from srpo_lightning.training.context import check_degree, context_degree
from srpo_lightning.training.strategies import ShardedStrategy

ADD_TRACKING = "add srpo_lightning.callbacks.RewardTracking to trainer.callbacks"

HOW_IT_RUNS = {"dtype", "cache_size", "gradient_checkpointing", "quantize"}
"""Arguments of rewards that make no other model."""

Kind = TypeVar("Kind", bound=Callback)


def check_effects(command: str, trainer: Trainer, module: SRPOModule, data: PromptData) -> None:
    """Refuse what would be ignored.

    Args:
        command: Name of the command: fit, validate, test or predict.

    Raises:
        ValueError: naming the setting and the cure.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    _check_strategy(trainer.strategy)
    if (degree := context_degree(trainer.strategy)) > 1:
        check_degree(degree, trainer.world_size)
        module.policy.check_divided(degree, data.sizes, data.cache.encoder.shapes)
    tracking = next(iter(_all(callbacks, RewardTracking)), None)
    if tracking is not None and command != "predict":
        _check_judge(tracking, module.reward)
    if command in ("validate", "test") and tracking is None:
        raise ValueError(f"{command} measures nothing without RewardTracking: {ADD_TRACKING}, or draw with `predict`")
    if command == "fit":
        evaluations = _evaluations(trainer, callbacks, tracking, data.eval_samples_per_prompt)
        for checkpoint in _all(callbacks, RunCheckpoint):
            _check_monitor(checkpoint, evaluations)
        for guard in _all(callbacks, OverOptimizationGuard):
            _check_guard(guard, evaluations)
            _check_lowering(guard, module)
        _check_other_monitors(callbacks, evaluations.numbers)
        if _all(callbacks, Report):
            _check_report(evaluations, has_pictures=bool(_all(callbacks, SampleLogger)))
        if data.offline_ratio:
            module.objective.check_pictures()
        _check_margin(module)


class Evaluations(NamedTuple):
    """What is measured while a run trains.

    Args:
        tracking: Callback that measures; None where there is none.
        weights: Kinds of weights whose samples are measured.
        numbers: Names of what is measured, as `<weights>/<name>`.
        idle: Setting for which no evaluation comes, with the cure; None where one comes.
    """

    tracking: RewardTracking | None
    weights: list[str]
    numbers: list[str]
    idle: str | None

    def needed(self, what: str) -> RewardTracking:
        """The callback that measures; refuse `what`, which is made of its numbers, where there are none."""
        if self.tracking is None:
            raise ValueError(f"{what}, which RewardTracking measures, and it is not there: {ADD_TRACKING}")
        if self.idle:
            raise ValueError(f"{what}, but while training there is none: {self.idle}")
        return self.tracking


def _evaluations(
    trainer: Trainer, callbacks: Iterable[Callback], tracking: RewardTracking | None, samples_per_prompt: int
) -> Evaluations:
    weights = evaluated_weights(next(iter(_all(callbacks, EMA)), None))
    names = tracking.numbers(samples_per_prompt) if tracking else []
    numbers = [f"{kind}/{name}" for kind in weights for name in names]
    return Evaluations(tracking, weights, numbers, why_nothing_is_evaluated(trainer))


def evaluated_weights(ema: EMA | None) -> list[str]:
    """Whose samples are measured after training has begun."""
    if ema is None:
        return ["policy"]
    return {"both": ["policy", "ema"], "ema": ["ema"], "policy": ["policy"]}[ema.evaluate]


def why_nothing_is_evaluated(trainer: Trainer) -> str | None:
    """The setting for which no evaluation comes while training, with the cure; None where one comes."""
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0, leave it out"
    if every is not None and not isinstance(trainer.limit_train_batches, int):
        return (
            "trainer.check_val_every_n_epoch counts epochs, and the stream of training prompts has no end: set it to "
            "null and trainer.val_check_interval to the micro-batches between evaluations"
        )
    num_batches = trainer.max_steps * trainer.accumulate_grad_batches
    if every is None and isinstance(interval, int) and 0 < num_batches < interval:
        return f"trainer.val_check_interval is {interval}, of {num_batches} micro-batches: lower it"
    return None


def _check_strategy(strategy: Strategy) -> None:
    """Others have no part that divides the policy or compares ranks, or start processes that this module cannot."""
    is_known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy)
    if not is_known or isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, which this project is not made for: leave it at auto, or "
            "take ddp, or ReplicatedStrategy or ShardedStrategy of srpo_lightning.training.strategies"
        )


def _check_other_monitors(callbacks: Iterable[Callback], names: list[str]) -> None:
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, RunCheckpoint) or not isinstance(monitor, str) or monitor.startswith("train/"):
            continue
        logged = [f"val/{name}" for name in names]
        if monitor not in logged:
            near = nearest(monitor, logged) or "; val/policy/held_out is one that is, with RewardTracking"
            raise ValueError(f"{type(callback).__name__}.monitor is {monitor}, which nothing logs{near}")


def _all(callbacks: Iterable[Callback], kind: type[Kind]) -> list[Kind]:
    return [callback for callback in callbacks if isinstance(callback, kind)]


def check_single(callbacks: Iterable[Callback]) -> None:
    """Refuse one of this package's callbacks twice.

    Raises:
        ValueError: naming it.
    """
    counts = Counter(type(callback) for callback in callbacks)
    for kind, count in counts.items():
        if count > 1 and kind.__module__.startswith("srpo_lightning"):
            where = "it is what checkpoint.* sets" if kind is RunCheckpoint else "they would write over each other"
            raise ValueError(f"trainer.callbacks has {kind.__name__} {count} times: {where}; leave one out")


def _check_monitor(checkpoint: RunCheckpoint, evaluations: Evaluations) -> None:
    monitor, numbers = checkpoint.monitor, evaluations.numbers
    if monitor is None:
        for name, default in (("mode", "max"), ("keep_best", 1)):
            if getattr(checkpoint, name) != default:
                raise ValueError(
                    f"checkpoint.{name} is {getattr(checkpoint, name)}, but without checkpoint.monitor no checkpoint "
                    "is best: set that to a number of RewardTracking, for instance policy/held_out"
                )
        return
    evaluations.needed(f"checkpoint.monitor is {monitor}")
    if monitor not in numbers:
        names = dict.fromkeys(number.partition("/")[2] for number in numbers)
        kinds = " or ".join(evaluations.weights)
        near = nearest(monitor, numbers) or f": that is {kinds}, then / and {', '.join(names)}"
        raise ValueError(f"checkpoint.monitor is {monitor}, which RewardTracking does not write{near}")


def _check_guard(guard: OverOptimizationGuard, evaluations: Evaluations) -> None:
    tracking = evaluations.needed("OverOptimizationGuard watches evaluations")
    if not tracking.held_out:
        raise ValueError(
            "OverOptimizationGuard watches the held-out score, and RewardTracking has no judge to measure it: give it "
            "one, for instance a ClipReward of another model than the reward, or held_out of its metrics"
        )
    if guard.weights not in evaluations.weights:
        raise ValueError(
            f"OverOptimizationGuard.weights is {guard.weights}, whose samples are not evaluated, only those of "
            f"{' and '.join(evaluations.weights)}: set it to that, or EMA.evaluate to both"
        )
    if guard.max_drift is not None and not tracking.has_features:
        raise ValueError(
            f"OverOptimizationGuard.max_drift is {guard.max_drift}, but the drift is measured by the judge's image "
            f"features, and {type(tracking.judge).__name__} has none: take a ClipReward as judge, or leave it out"
        )


def _check_lowering(guard: OverOptimizationGuard, module: SRPOModule) -> None:
    scheduler = module.lr_scheduler
    if guard.action != "lower_learning_rate" or scheduler is None or stays_lowered(module.optimizer, scheduler):
        return
    raise ValueError(
        "OverOptimizationGuard.action is lower_learning_rate, which model.lr_scheduler would undo at its next step: "
        "take one that goes by its base rates alone, for instance torch.optim.lr_scheduler.CosineAnnealingLR, or "
        "action stop"
    )


def _check_report(evaluations: Evaluations, has_pictures: bool) -> None:
    if evaluations.tracking is None:
        raise ValueError(f"Report is made of what RewardTracking measures, and it is not there: {ADD_TRACKING}")
    if not has_pictures:
        rank_zero_warn(
            "Report will have no pictures: they are SampleLogger's, srpo_lightning.callbacks.SampleLogger in "
            "trainer.callbacks"
        )


def _check_judge(tracking: RewardTracking, reward: Reward) -> None:
    """A judge that is trained against says nothing that the reward does not."""
    trained = {str(_model_of(own)) for own in _parts(reward)}
    names = {} if tracking.judge is None else {"judge": tracking.judge}
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
