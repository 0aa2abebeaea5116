"""A step that is evaluated is saved after its evaluation; one that could not be is evaluated when the run goes on."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from srpo_lightning.callbacks import OverOptimizationGuard, RunCheckpoint
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.files import records
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.callbacks.test_checkpoint import assert_same_run, states, steps


class Evaluations(Recorder):
    """A line for each evaluation, and how many there were, as state; optionally an end in the middle of one."""

    @staticmethod
    def file(run: RunFolder) -> Path:
        return run.path / "evaluations.jsonl"

    def __init__(self, ends_at: int = -1, number: int | None = None) -> None:
        self.ends_at, self.number = ends_at, number
        self.count = 0
        self.at_saving: dict[int, list[int]] = {}

    def on_validation_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.ends_at and self.number is None:
            raise RuntimeError("stopped by the test")
        if trainer.global_step == self.ends_at:
            os.kill(os.getpid(), self.number)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.count += 1
        records.append(self.file(RunFolder.of(trainer)), {"step": trainer.global_step})

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.at_saving[trainer.global_step] = recorded(trainer.default_root_dir)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict) -> None:
        self.count = state_dict["count"]


def recorded(run) -> list[int]:
    return [record["step"] for record in records.read(Evaluations.file(RunFolder(run)))]


def fit(models, features, run, evaluations, *, saver=None, ckpt_path=None, **settings) -> None:
    defaults = {"max_steps": 5, "val_check_interval": 4, "limit_val_batches": 1, "accumulate_grad_batches": 2}
    trainer = tiny.new_trainer(run, [evaluations, saver or RunCheckpoint(2, keep=9)], **defaults | settings)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features), ckpt_path=ckpt_path)


def test_a_checkpoint_has_the_evaluation_of_its_step_in_it(models, features, tmp_path):
    evaluations = Evaluations()
    fit(models, features, tmp_path, evaluations)
    assert evaluations.at_saving == {2: [2], 4: [2, 4], 5: [2, 4]}
    assert [states(tmp_path, step)["callbacks"]["Evaluations"]["count"] for step in (2, 4)] == [1, 2]


@pytest.mark.parametrize("ends", [{}, {"number": signal.SIGTERM}], ids=["an error", "SIGTERM"])
def test_a_run_that_ends_within_an_evaluation_begins_with_it_when_it_is_resumed(models, features, tmp_path, ends):
    for run, evaluations in ((tmp_path / "a", Evaluations()), (tmp_path / "b", Evaluations(4, **ends))):
        saver = RunCheckpoint(3, keep=9)
        try:
            fit(models, features, run, evaluations, saver=saver)
        except (RuntimeError, SystemExit):
            assert steps(run) == [3, 4]
            records.append(Evaluations.file(RunFolder(run)), {"step": 4})  # of a part of it
            fit(
                models,
                features,
                run,
                Evaluations(),
                saver=RunCheckpoint(3, keep=9),
                ckpt_path=RunFolder(run).checkpoints()[-1],
            )
    assert recorded(tmp_path / "b") == recorded(tmp_path / "a") == [2, 4]
    a, b = (states(tmp_path / run, 5) for run in "ab")
    assert a["callbacks"]["Evaluations"] == b["callbacks"]["Evaluations"] == {"count": 2}
    assert_same_run(a, b)


def test_a_run_that_goes_on_from_an_evaluated_step_does_not_evaluate_it_again(models, features, tmp_path):
    fit(models, features, tmp_path, Evaluations(), max_steps=4)
    fit(models, features, tmp_path, Evaluations(), ckpt_path=RunFolder(tmp_path).checkpoint(2))
    assert recorded(tmp_path) == [2, 4]


def test_sigterm_within_the_last_evaluation_waits_for_it(models, features, tmp_path):
    """A resumed run would have no step to evaluate after."""
    fit(models, features, tmp_path, Evaluations(4, signal.SIGTERM), max_steps=4)
    assert recorded(tmp_path) == [2, 4]
    assert not states(tmp_path, 4)["evaluation_due"]


class Rising(Callback):
    """Evaluations that say after each step that it is enough."""

    def on_validation_end(self, trainer, pl_module) -> None:
        guard = next(c for c in trainer.callbacks if isinstance(c, OverOptimizationGuard))
        guard._act(trainer, "enough")


@pytest.mark.parametrize(("action", "last"), [("stop", 2), ("warn", 5)])
def test_a_run_that_the_guard_has_stopped_stays_so_until_it_is_asked_otherwise(
    models, features, tmp_path, action, last
):
    settings = {"max_steps": 5, "val_check_interval": 2, "limit_val_batches": 1}

    def run(*callbacks, **resumed) -> list[int]:
        trainer = tiny.new_trainer(tmp_path, [*callbacks, RunCheckpoint(1, keep=1)], **settings)
        trainer.fit(tiny.new_module(models), tiny.new_data(models, features), **resumed)
        return steps(tmp_path)

    assert run(OverOptimizationGuard(), Rising()) == [2]
    assert run(OverOptimizationGuard(action=action), ckpt_path=RunFolder(tmp_path).checkpoint(2)) == [last]
    saved = torch.load(RunFolder(tmp_path).checkpoints()[-1], weights_only=True)["callbacks"]
    assert saved["OverOptimizationGuard"]["has_stopped"]
