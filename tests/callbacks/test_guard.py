"""The guard on evaluations that are made up: a score that rises, stays or falls by a known amount."""

import math
from types import SimpleNamespace

import pytest
import torch

from srpo_lightning.callbacks import OverOptimizationGuard
from srpo_lightning.callbacks.guard import stays_lowered
from srpo_lightning.evaluation.comparison import BASE, HELD_OUT
from srpo_lightning.evaluation.exchange import Evaluation, Evaluations
from srpo_lightning.evaluation.metrics import Table

NOISE = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def evaluation(held_out: float, reward: float, noise: torch.Tensor = NOISE, **numbers: float) -> Evaluation:
    indices = torch.arange(40)
    columns = {HELD_OUT: held_out + 0.1 * noise, "reward": torch.full((40,), reward, dtype=torch.float64)}
    return Evaluation(Table(indices, indices, columns, torch.empty(40, 0)), {"diversity": 1.0, **numbers})


class Run:
    """A trainer as the guard sees it."""

    def __init__(self, guard: OverOptimizationGuard) -> None:
        self.guard = guard
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
        self.trainer = SimpleNamespace(should_stop=False, optimizers=[self.optimizer], lr_scheduler_configs=[])

    def evaluate(self, step: int, found: Evaluation) -> bool:
        self.guard.watch(self.trainer, Evaluations(step, {"policy": found, BASE: evaluation(0.0, 0.0)}))
        return self.trainer.should_stop


def test_training_stops_when_the_held_out_score_falls_and_the_reward_does_not():
    run = Run(OverOptimizationGuard(patience=2))
    assert not run.evaluate(0, evaluation(0.0, 0.0))
    assert not run.evaluate(10, evaluation(0.5, 1.0))
    assert not run.evaluate(20, evaluation(0.4, 1.5))
    assert run.evaluate(30, evaluation(0.3, 2.0))
    assert run.guard.best_step == 10


def test_a_better_evaluation_ends_the_alarm():
    run = Run(OverOptimizationGuard(patience=2))
    for step, score in enumerate([0.0, 0.5, 0.4, 0.6, 0.5]):
        assert not run.evaluate(step, evaluation(score, float(step)))


def test_a_fall_that_chance_explains_is_no_alarm():
    """The same fall of the mean: alike in every sample it counts, as one of many differences it does not."""
    other = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = NOISE.mean() + other - other.mean()
    for noise, stops in ((NOISE, True), (other, False)):
        run = Run(OverOptimizationGuard(patience=1))
        run.evaluate(10, evaluation(0.5, 1.0))
        assert run.evaluate(20, evaluation(0.49, 1.5, noise)) == stops


def test_a_reward_that_falls_too_is_bad_training_and_not_over_optimisation():
    run = Run(OverOptimizationGuard(patience=1))
    run.evaluate(10, evaluation(0.5, 1.0))
    assert not run.evaluate(20, evaluation(0.1, 0.5))


@pytest.mark.parametrize(("numbers", "settings"), [({"diversity": 0.7}, {}), ({"drift": 3.0}, {"max_drift": 2.0})])
def test_lost_diversity_and_drift_stop_a_run_whose_scores_still_rise(numbers, settings):
    run = Run(OverOptimizationGuard(patience=1, **settings))
    assert not run.evaluate(10, evaluation(0.5, 1.0))
    assert run.evaluate(20, evaluation(0.6, 1.5, **numbers))


CLIPS = {"motion": 0.02, "flicker": 0.001, "consistency": 0.95}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"motion": 0.009}, "motion is 0.009, the base's is 0.02: clips stand still"),
        ({"flicker": 0.0021}, "flicker is 0.0021, the base's is 0.001"),
        ({"consistency": 0.8}, "consistency is 0.8, the base's is 0.95"),
    ],
)
def test_clips_that_stand_still_flicker_or_fall_apart_stop_a_run_whose_scores_still_rise(now, told):
    guard = OverOptimizationGuard(patience=1)
    assert not guard.reasons(evaluation(0.5, 1.0, **CLIPS), CLIPS, 10)
    (reason,) = guard.reasons(evaluation(0.6, 1.5, **CLIPS | now), CLIPS, 20)
    assert reason.startswith(told)
    of_pictures = evaluation(0.7, 1.6), {"diversity": 1.0}
    assert not guard.reasons(*of_pictures, 30)
    careless = OverOptimizationGuard(min_motion=0, max_flicker=None, min_consistency=0)
    assert not careless.reasons(evaluation(0.6, 1.5, **CLIPS | now), CLIPS, 20)


def test_the_learning_rate_is_lowered_three_times_before_the_run_stops():
    run = Run(OverOptimizationGuard(patience=1, action="lower_learning_rate", learning_rate_factor=0.5))
    run.evaluate(0, evaluation(0.5, 0.0))
    rates = []
    for step in range(1, 5):
        run.evaluate(step, evaluation(0.1, 1.0))
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125, 0.125]
    assert run.trainer.should_stop


def test_a_warning_names_the_best_step_and_goes_on():
    run = Run(OverOptimizationGuard(patience=1, action="warn"))
    run.evaluate(7, evaluation(0.5, 0.0))
    with pytest.warns(UserWarning, match=r"over-optimisation: the held-out score fell by 0\.4.*since step 7.*step 7"):
        run.evaluate(9, evaluation(0.1, 1.0))
    assert not run.trainer.should_stop


def test_a_resumed_guard_goes_on_comparing_with_the_best():
    first = Run(OverOptimizationGuard(patience=2))
    for step, score in enumerate([0.5, 0.4]):
        first.evaluate(step, evaluation(score, float(step)))
    second = Run(OverOptimizationGuard(patience=2))
    second.guard.load_state_dict(first.guard.state_dict())
    assert second.evaluate(2, evaluation(0.3, 2.0))
    assert second.guard.best_step == 0


def test_scores_that_are_not_numbers_are_an_alarm_and_never_the_best():
    run = Run(OverOptimizationGuard(patience=1))
    assert run.evaluate(0, evaluation(math.nan, 0.0))
    assert run.guard.best is None
    run = Run(OverOptimizationGuard(patience=2))
    for step, score in enumerate([0.5, math.nan, 0.4]):
        stops = run.evaluate(step, evaluation(score, float(step)))
    assert stops
    assert run.guard.best_step == 0


def test_what_was_measured_otherwise_is_not_compared():
    run = Run(OverOptimizationGuard(patience=1))
    assert not run.evaluate(10, evaluation(0.5, 1.0))
    other, resumed = evaluation(0.1, 2.0), Run(OverOptimizationGuard(patience=1))
    resumed.guard.load_state_dict(run.guard.state_dict())
    few = other._replace(
        table=Table(
            *(own[:30] for own in other.table[:2]),
            {n: c[:30] for n, c in other.table.columns.items()},
            torch.empty(30, 0),
        )
    )
    resumed.guard.watch(resumed.trainer, Evaluations(20, {"policy": few}, "other prompts"))
    assert not resumed.trainer.should_stop
    assert resumed.guard.best_step == 20
    assert run.evaluate(20, other), "the same measure is compared"


@pytest.mark.parametrize(
    ("scheduler", "stays"),
    [
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9), True),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=1e-6), True),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1), True),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, total_steps=2), False),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step), True),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, total_steps=9), False),
        (lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-5, 1e-4, cycle_momentum=False), False),
        (lambda o: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.LinearLR(o)]), False),
    ],
)
def test_a_scheduler_that_would_undo_a_lower_rate_is_known(scheduler, stays):
    assert stays_lowered(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), scheduler) == stays
