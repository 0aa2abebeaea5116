"""A guard against over-optimisation: training that goes on to please its reward and nobody else."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.evaluation.comparison import BASE, CONSISTENCY, HELD_OUT
from srpo_lightning.evaluation.exchange import Evaluation, Evaluations, ReadsEvaluations
from srpo_lightning.evaluation.metrics import Table, bootstrap_mean
from srpo_lightning.files import records
from srpo_lightning.files.records import Record
from srpo_lightning.run_folder import RunFolder


class Limit(NamedTuple):
    """How far a number of clips may go from the base's.

    Args:
        name: Name of the number.
        factor: Factor of the base's number that is the limit; None: there is none.
        meaning: What it means that the limit is passed.
        is_most: Whether the limit is the most; else it is the least.
    """

    name: str
    factor: float | None
    meaning: str
    is_most: bool = False

    def is_passed(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> bool:
        """Whether the number is beyond the limit; never where it or the base's was not measured."""
        if self.factor is None or self.name not in numbers or self.name not in base:
            return False
        limit = self.factor * base[self.name]
        return numbers[self.name] > limit if self.is_most else numbers[self.name] < limit

    def told(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> str:
        """Both numbers, in words."""
        return f"{self.name} is {numbers[self.name]:.3g}, the base's is {base[self.name]:.3g}: {self.meaning}"


def lower(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiply learning rates, and what schedulers make them of from now on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
    for scheduler in schedulers:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def stays_lowered(new_optimizer: OptimizerCallable, new_scheduler: LRSchedulerCallable) -> bool:
    """Whether a schedule stays below what it would be, once it is lowered: not if its class goes by more than that."""
    rates = []
    for factor in (1.0, 0.5):
        optimizer = new_optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
        scheduler = new_scheduler(optimizer)
        optimizer.step()
        if isinstance(scheduler, (OneCycleLR, CyclicLR)) or not hasattr(scheduler, "base_lrs"):
            return False  # they go by highest rates too, or are several schedulers
        lower([optimizer], [scheduler], factor)
        own = []
        for _ in range(3):
            scheduler.step()
            own.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(torch.tensor(own, dtype=torch.float64))
    return bool((rates[1] <= 0.75 * rates[0]).all())


class OverOptimizationGuard(Recorder, ReadsEvaluations):
    """Watches held-out scores, diversity, drift and what moves, and acts when they say that it is enough.

    Needs RewardTracking, whose tables it compares: the same prompts from the same noise at every evaluation. It acts
    when one of these holds for `patience` evaluations in a row:

    - the held-out score is below its best so far by more than chance (the paired difference's interval over prompts is
      below zero), while the training reward is not below what it was then: the gap between the two is growing;
    - the samples' diversity has fallen below `min_diversity` times the base's;
    - their drift from the base (CMMD) is above `max_drift`;
    - of clips: motion has fallen below `min_motion` times the base's, so that they stand still; flicker has risen above
      `max_flicker` times the base's; or consistency has fallen below `min_consistency` times the base's.

    What the held-out score is, RewardTracking says (`held_out`); `checkpoint.monitor: policy/held_out` keeps the best
    checkpoint, which is then found by `--ckpt_path best`. What speaks against an evaluation is appended to
    `<run folder>/guard.jsonl`, also while it waits.

    Args:
        weights: Weights whose samples are watched.
        action: Action that is taken: warn and go on; stop; or lower the learning rate, and stop after three times.
        patience: Evaluations in a row before the guard acts.
        min_diversity: Share of the base's diversity below which the guard acts.
        max_drift: Drift from the base (CMMD) above which the guard acts; null: not watched.
        min_motion: Share of the base's motion below which the guard acts, of clips; 0 does not watch it.
        max_flicker: Multiple of the base's flicker above which the guard acts, of clips; null: not watched.
        min_consistency: Share of the base's consistency below which the guard acts, of clips; 0 does not watch it.
        learning_rate_factor: Factor by which lower_learning_rate multiplies the learning rate.
    """

    max_times_lowered = 3

    def __init__(
        self,
        weights: Literal["policy", "ema"] = "policy",
        action: Literal["warn", "stop", "lower_learning_rate"] = "stop",
        patience: PositiveInt = 2,
        min_diversity: ClosedUnitInterval = 0.8,
        max_drift: PositiveFloat | None = None,
        learning_rate_factor: ClosedUnitInterval = 0.3,
        min_motion: ClosedUnitInterval = 0.5,
        max_flicker: PositiveFloat | None = 2.0,
        min_consistency: ClosedUnitInterval = 0.9,
    ) -> None:
        self.weights = weights
        self.action = action
        self.patience = patience
        self.min_diversity = min_diversity
        self.max_drift = max_drift
        self.limits = (
            Limit("motion", min_motion, "clips stand still"),
            Limit("flicker", max_flicker, "light flickers", is_most=True),
            Limit(CONSISTENCY, min_consistency, "things change from frame to frame"),
        )
        self.learning_rate_factor = learning_rate_factor
        self.best: Table | None = None
        self.best_key = ""
        self.best_step = 0
        self.alarms = 0
        self.times_lowered = 0
        self.has_stopped = False

    @staticmethod
    def file(run: RunFolder) -> Path:
        """What was said of evaluations."""
        return run.advice

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was stopped stays so."""
        super().on_train_start(trainer, pl_module)
        if self.has_stopped and self.action != "warn":
            rank_zero_info("guard: it has ended this run; to go on all the same set its action to warn, or remove it")
            trainer.should_stop = True

    def on_evaluation(self, trainer: Trainer, module: LightningModule, evaluations: Evaluations) -> None:
        """Watch the evaluations of a run that trains."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        advice = self.watch(trainer, evaluations)
        if advice is not None and trainer.is_global_zero:
            records.append(self.file(RunFolder.of(trainer)), advice)

    def watch(self, trainer: Trainer, evaluations: Evaluations) -> Record | None:
        """Compare an evaluation with the best and with the base, and act; return what speaks against it."""
        found = evaluations.by_weights
        watched = self.weights if self.weights in found else "policy"
        evaluation = found.get(watched)
        if evaluation is None:
            return None
        base = found.get(BASE)
        if self.best is not None and not self._is_measured_alike(evaluations.key, evaluation.table):
            self.best, self.alarms = None, 0
            rank_zero_info(
                "guard: prompts, rewards or samples are others than those of the best evaluation so far, with which "
                "nothing is compared any more"
            )
        self.best_key = evaluations.key
        reasons = self.reasons(evaluation, base.numbers if base else {}, evaluations.step)
        self.alarms = self.alarms + 1 if reasons else 0
        if not reasons:
            return None
        advice = {"step": evaluations.step, "weights": watched, "reasons": reasons, "best_step": self.best_step}
        return advice | {"action": self._act(trainer, "; ".join(reasons)) if self.alarms >= self.patience else "wait"}

    def _is_measured_alike(self, key: str, table: Table) -> bool:
        """Whether samples compare with the best ones so far, of which earlier versions kept no key."""
        assert self.best is not None
        return self.best_key == key or (not self.best_key and torch.equal(self.best.indices, table.indices))

    def reasons(self, evaluation: Evaluation, base: Mapping[str, float], step: int) -> list[str]:
        """What speaks against an evaluation; one that is the best so far is remembered."""
        (table, numbers), found = evaluation, []
        if not table.columns[HELD_OUT].isfinite().all():
            found.append("held-out scores are not numbers")
        elif self.best is None or table.columns[HELD_OUT].mean() > self.best.columns[HELD_OUT].mean():
            self.best, self.best_step = table, step
        else:
            fall = bootstrap_mean(table.columns[HELD_OUT] - self.best.columns[HELD_OUT], table.groups)
            gain = float((table.columns["reward"] - self.best.columns["reward"]).mean())
            if fall.high < 0 <= gain:
                found.append(
                    f"the held-out score fell by {-fall.value:.4g} ({-fall.high:.4g} to {-fall.low:.4g}) since step "
                    f"{self.best_step} while the training reward rose by {gain:.4g}"
                )
        least = self.min_diversity * base.get("diversity", 0.0)
        if numbers.get("diversity", least) < least:
            found.append(f"diversity is {numbers['diversity']:.3f}, the base's is {base['diversity']:.3f}")
        if self.max_drift is not None and numbers.get("drift", 0.0) > self.max_drift:
            found.append(f"drift from the base is {numbers['drift']:.4g}, more than {self.max_drift:.4g}")
        return found + [limit.told(numbers, base) for limit in self.limits if limit.is_passed(numbers, base)]

    def _act(self, trainer: Trainer, reason: str) -> str:
        cure = f"the best held-out score was at step {self.best_step}: --ckpt_path best, with checkpoint.monitor"
        if self.action == "lower_learning_rate" and self.times_lowered < self.max_times_lowered:
            self.times_lowered, self.alarms = self.times_lowered + 1, 0
            schedulers = [own.scheduler for own in trainer.lr_scheduler_configs]
            lower(trainer.optimizers, schedulers, self.learning_rate_factor)
            rank_zero_info(f"guard: {reason}; learning rate times {self.learning_rate_factor} ({cure})")
            return self.action
        if self.action == "warn":
            rank_zero_warn(f"over-optimisation: {reason}; {cure}")
            return self.action
        rank_zero_info(f"guard: {reason}; training ends here ({cure})")
        trainer.should_stop = self.has_stopped = True
        return "stop"

    def state_dict(self) -> dict[str, Any]:
        """The best evaluation, with which a resumed run goes on comparing."""
        best = self.best and {"indices": self.best.indices, "groups": self.best.groups, "columns": self.best.columns}
        counts = {"best_step": self.best_step, "alarms": self.alarms, "times_lowered": self.times_lowered}
        return {"best": best, "best_key": self.best_key, **counts, "has_stopped": self.has_stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        best = state_dict["best"]
        self.best = best and Table(**best, features=torch.empty(len(best["indices"]), 0))
        self.best_key = state_dict.get("best_key", "")
        self.best_step, self.alarms = state_dict["best_step"], state_dict["alarms"]
        self.times_lowered = state_dict["times_lowered"]
        self.has_stopped = state_dict.get("has_stopped", False)
