import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from srpo_lightning.callbacks import EMA, RunCheckpoint
from srpo_lightning.checkpoints import checkpoint_path, checkpoints
from tests import tiny
from tests.faults import History, Stop


def fit(models, features, folder, *callbacks, ckpt_path=None, **settings) -> None:
    tiny.new_trainer(folder, callbacks, **settings).fit(
        tiny.new_module(models), tiny.new_data(models, features), ckpt_path=ckpt_path
    )


def steps(folder) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in checkpoints(folder)]


@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (9, [2, 4, 5])])
def test_every_nth_step_and_the_last_are_saved_and_the_newest_kept(models, features, tmp_path, keep, kept):
    fit(models, features, tmp_path, RunCheckpoint(2, keep), max_steps=5)
    assert steps(tmp_path) == kept


def test_steps_are_optimizer_steps_when_gradients_accumulate(models, features, tmp_path):
    fit(models, features, tmp_path, RunCheckpoint(2, keep=9), max_steps=5, accumulate_grad_batches=3)
    assert steps(tmp_path) == [2, 4, 5]
    saved = torch.load(checkpoint_path(tmp_path, 4), weights_only=True)
    assert saved["srpo"]["micro_step"] == 12


class Terminate(Callback):
    """Sends SIGTERM to this process after so many micro-batches; Lightning ends the run between two of them."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_ended_by_sigterm_saves_the_weights_of_its_last_whole_step(models, features, tmp_path, accumulate):
    history = History()
    with pytest.raises(SIGTERMException):
        fit(models, features, tmp_path, history, RunCheckpoint(100), Terminate(5), accumulate_grad_batches=accumulate,
            max_steps=9)  # fmt: skip
    assert steps(tmp_path) == [5 // accumulate]
    saved = states(tmp_path, 5 // accumulate)
    assert saved["srpo"]["micro_step"] == saved["PromptData"]["num_batches"] == 5
    assert all(torch.equal(saved["state_dict"][name], weights) for name, weights in history.weights[-1].items())


class InStep(Stop):
    """Raises in the middle of a step."""

    on_train_batch_end = None

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.after -= 1
        if not self.after:
            raise RuntimeError("stopped by the test")


def states(folder, step: int) -> dict:
    return torch.load(checkpoint_path(folder, step), weights_only=True)


def assert_same_run(a: dict, b: dict) -> None:
    """Weights, optimizer, average and counters of two checkpoints, bit for bit."""
    assert a["srpo"] == b["srpo"]
    assert a["PromptData"] == b["PromptData"]
    for name, weights in a["state_dict"].items():
        assert torch.equal(weights, b["state_dict"][name])
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name])
    average, other = ({k: v for k, v in c["callbacks"].items() if k.startswith("EMA")}["EMA"] for c in (a, b))
    assert average["num_updates"] == other["num_updates"]
    for name, weights in a["ema"].items():
        assert torch.equal(weights, b["ema"][name])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(models, features, tmp_path, accumulate):
    """Weights, optimizer, average, position in the stream, random numbers; also when gradients accumulate."""
    settings = {"accumulate_grad_batches": accumulate}
    fit(models, features, tmp_path / "a", EMA(0.5), RunCheckpoint(2, keep=9), max_steps=5, **settings)
    fit(models, features, tmp_path / "b", EMA(0.5), RunCheckpoint(2, keep=9), max_steps=2, **settings)
    fit(models, features, tmp_path / "b", EMA(0.5), RunCheckpoint(2, keep=9), max_steps=5, **settings,
        ckpt_path=checkpoint_path(tmp_path / "b", 2))  # fmt: skip
    assert steps(tmp_path / "b") == [2, 4, 5]
    for step in (2, 4, 5):
        assert_same_run(states(tmp_path / "a", step), states(tmp_path / "b", step))


def test_the_checkpoint_that_a_run_resumed_from_is_not_written_again_in_the_middle_of_a_step(
    models, features, tmp_path
):
    fit(models, features, tmp_path, RunCheckpoint(2), max_steps=2, accumulate_grad_batches=3)
    path = checkpoint_path(tmp_path, 2)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(models, features, tmp_path, Stop(2), RunCheckpoint(2), ckpt_path=path, accumulate_grad_batches=3,
            max_steps=4)  # fmt: skip
    assert path.read_bytes() == before
    assert states(tmp_path, 2)["srpo"]["micro_step"] == 6


def test_a_run_broken_in_the_middle_of_a_step_saves_nothing_new(models, features, tmp_path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(models, features, tmp_path, RunCheckpoint(2), InStep(4))
    assert steps(tmp_path) == [2]
