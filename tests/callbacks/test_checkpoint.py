import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from srpo_lightning.callbacks import EMA, RunCheckpoint, stop_signals
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny
from tests.faults import History, Stop, Terminate


def fit(models, features, folder, *callbacks, ckpt_path=None, **settings) -> None:
    tiny.new_trainer(folder, callbacks, **settings).fit(
        tiny.new_module(models), tiny.new_data(models, features), ckpt_path=ckpt_path
    )


def steps(folder) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in RunFolder(folder).checkpoints()]


@pytest.mark.parametrize(("keep", "kept"), [(1, [5]), (2, [4, 5]), (9, [2, 4, 5])])
def test_every_nth_step_and_the_last_are_saved_and_the_newest_kept(models, features, tmp_path, keep, kept):
    fit(models, features, tmp_path, RunCheckpoint(2, keep), max_steps=5)
    assert steps(tmp_path) == kept


def test_steps_are_optimizer_steps_when_gradients_accumulate(models, features, tmp_path):
    fit(models, features, tmp_path, RunCheckpoint(2, keep=9), max_steps=5, accumulate_grad_batches=3)
    assert steps(tmp_path) == [2, 4, 5]
    saved = torch.load(RunFolder(tmp_path).checkpoint(4), weights_only=True)
    assert saved["srpo"]["micro_step"] == 12


@pytest.mark.parametrize(("accumulate", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_run_ended_by_sigterm_or_ctrl_c_finishes_its_step_and_saves_it(
    models, features, tmp_path, capfd, caplog, accumulate, number
):
    history, before = History(), signal.getsignal(number)
    with pytest.raises(SystemExit) as error, caplog.at_level("INFO"):
        fit(models, features, tmp_path, history, RunCheckpoint(100), Terminate(5, number=number), max_steps=9,
            accumulate_grad_batches=accumulate)  # fmt: skip
    assert error.value.code == 128 + number
    assert ("Ctrl-C: the step is finished and saved first" in capfd.readouterr().err) == (number == signal.SIGINT)
    said = f"{number.name}: step {steps(tmp_path)[0]} is saved; go on with --ckpt_path last"
    assert said in [record.message for record in caplog.records]
    assert steps(tmp_path) == [-(-5 // accumulate)]
    saved = states(tmp_path, steps(tmp_path)[0])
    assert saved["srpo"]["micro_step"] == saved["PromptData"]["num_batches"] == 5 + 5 % accumulate
    assert all(torch.equal(saved["state_dict"][name], weights) for name, weights in history.weights[-1].items())
    assert signal.getsignal(number) == before


def test_checkpoints_come_by_time_too_and_every_one_starts_the_clock_again(models, features, tmp_path, monkeypatch):
    """Each look at the clock is half a minute after the last: one at each step, one at each save, one at the start."""
    clock = itertools.count(0, 30)
    monkeypatch.setattr("srpo_lightning.callbacks.checkpoint.time.monotonic", lambda: next(clock))
    fit(models, features, tmp_path, RunCheckpoint(100, keep=9, every_n_minutes=1), max_steps=5)
    assert steps(tmp_path) == [2, 4, 5]


class Records(Callback):
    """Stands in for RewardTracking: writes one number for each validation."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        record = {"step": trainer.global_step, "weights": "ema", "judge": next(self.values)}
        RunFolder(trainer.default_root_dir).append_metrics(record)


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 3, 6]), ("min", [1, 4, 6])])
def test_the_best_and_the_newest_are_kept(models, features, tmp_path, mode, kept):
    """Every evaluated step is saved, whatever `every_n_steps`; a score that is not a number is never the best."""
    saver = RunCheckpoint(100, keep=1, monitor="ema/judge", mode=mode, keep_best=2)
    records = Records(0.1, 0.9, 0.8, 0.2, math.nan, 0.3)
    fit(models, features, tmp_path, saver, records, max_steps=6, val_check_interval=1, limit_val_batches=1)
    assert steps(tmp_path) == kept
    best = [2, 3, 6] if mode == "max" else [1, 4, 6]
    run = RunFolder(tmp_path)
    assert run.ranked_checkpoints("ema/judge", mode) == [run.checkpoint(step) for step in best]
    assert run.ranked_checkpoints("policy/judge", mode) == []


class BetweenBatches(Stop):
    """Raises before a micro-batch begins."""

    on_train_batch_end = None

    def on_train_batch_start(self, *args) -> None:
        self.after -= 1
        if self.after < 0:
            raise RuntimeError("stopped by the test")


@pytest.mark.parametrize("stop", [BetweenBatches(5), Terminate(5)], ids=["an error", "SIGTERM"])
def test_a_run_stopped_while_gradients_accumulate_goes_on_without_losing_any(models, features, tmp_path, stop):
    """After two of the three micro-batches of the second step: an error goes back, SIGTERM waits for the third."""
    settings = {"accumulate_grad_batches": 3}
    fit(models, features, tmp_path / "a", EMA(0.5), RunCheckpoint(9, keep=9), max_steps=4, **settings)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(models, features, tmp_path / "b", stop, EMA(0.5), RunCheckpoint(9, keep=9), max_steps=4, **settings)
    (step,) = steps(tmp_path / "b")
    assert step == (2 if isinstance(stop, Terminate) else 1)
    assert states(tmp_path / "b", step)["srpo"]["micro_step"] == 3 * step
    fit(models, features, tmp_path / "b", EMA(0.5), RunCheckpoint(9, keep=9), max_steps=4, **settings,
        ckpt_path=RunFolder(tmp_path / "b").checkpoint(step))  # fmt: skip
    assert_same_run(states(tmp_path / "a", 4), states(tmp_path / "b", 4))


class OutOfTime(Stop):
    """Does what trainer.max_time does."""

    def on_train_batch_end(self, trainer, *args) -> None:
        self.after -= 1
        trainer.should_stop |= self.after == 0


def test_a_run_whose_time_is_up_while_gradients_accumulate_goes_on_from_before_that_step(models, features, tmp_path):
    settings = {"accumulate_grad_batches": 3, "max_steps": 3}
    fit(models, features, tmp_path / "a", EMA(0.5), RunCheckpoint(9), **settings)
    fit(models, features, tmp_path / "b", OutOfTime(5), EMA(0.5), RunCheckpoint(9), **settings)
    assert steps(tmp_path / "b") == [1]
    path = RunFolder(tmp_path / "b").checkpoint(1)
    fit(models, features, tmp_path / "b", EMA(0.5), RunCheckpoint(9), **settings, ckpt_path=path)
    assert_same_run(states(tmp_path / "a", 3), states(tmp_path / "b", 3))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (2, 4)])
def test_another_number_of_samples_per_step_is_said_when_a_run_is_resumed(
    models, features, tmp_path, batch_size, accumulate
):
    fit(models, features, tmp_path, RunCheckpoint(1), max_steps=1)
    trainer = tiny.new_trainer(tmp_path, [RunCheckpoint(1)], max_steps=2, accumulate_grad_batches=accumulate)
    now = f"are 1 x {batch_size} x {accumulate} = {batch_size * accumulate}"
    with pytest.warns(UserWarning, match=f"were 1 x 2 x 1 = 2 .* {now}: .* at 2 and accumulate_grad_batches at 1"):
        trainer.fit(
            tiny.new_module(models),
            tiny.new_data(models, features, batch_size=batch_size),
            ckpt_path=RunFolder(tmp_path).checkpoint(1),
        )


class InStep(Stop):
    """Raises in the middle of a step."""

    on_train_batch_end = None

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.after -= 1
        if not self.after:
            raise RuntimeError("stopped by the test")


def states(folder, step: int) -> dict:
    return torch.load(RunFolder(folder).checkpoint(step), weights_only=True)


def assert_same_run(a: dict, b: dict) -> None:
    """Weights, optimizer, average and counters of two checkpoints, bit for bit."""
    assert a["srpo"] == b["srpo"]
    assert a["PromptData"] == b["PromptData"]
    for name, weights in a["state_dict"].items():
        assert torch.equal(weights, b["state_dict"][name])
    for index, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][index][name])
    if "ema" not in a:
        return
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
        ckpt_path=RunFolder(tmp_path / "b").checkpoint(2))  # fmt: skip
    assert steps(tmp_path / "b") == [2, 4, 5]
    for step in (2, 4, 5):
        assert_same_run(states(tmp_path / "a", step), states(tmp_path / "b", step))


def test_the_checkpoint_that_a_run_resumed_from_is_not_written_again_in_the_middle_of_a_step(
    models, features, tmp_path
):
    fit(models, features, tmp_path, RunCheckpoint(2), max_steps=2, accumulate_grad_batches=3)
    path = RunFolder(tmp_path).checkpoint(2)
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


def test_a_second_ctrl_c_leaves_at_once(models, features, tmp_path):
    """In a process of its own: after the first and the second of four micro-batches, and no step is saved."""
    settings = tiny.config(models, tmp_path / "run", features)
    stops = [
        {"class_path": "tests.faults.Terminate", "init_args": {"after": n, "number": signal.SIGINT}} for n in (1, 2)
    ]
    settings["trainer"] |= {"callbacks": stops, "accumulate_grad_batches": 4, "limit_val_batches": 0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    done = processes.start(["fit", "--config", str(tmp_path / "config.json")])
    assert done.returncode == -signal.SIGINT, done.output
    assert "Ctrl-C: the step is finished and saved first; again: leave at once" in done.output
    assert not RunFolder(tmp_path / "run").checkpoints()
    again = processes.start(["fit", "--config", str(tmp_path / "config.json"), "--trainer.callbacks", "[]"])
    assert again.returncode == 0, again.output  # the lock that was left is taken over


def test_ranks_take_a_ctrl_c_that_their_launcher_passes_on_for_the_same(monkeypatch):
    ended = []
    monkeypatch.setattr(stop_signals.signal, "raise_signal", ended.append)
    clock = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: next(clock))
    signals, before = stop_signals.StopSignals(), signal.getsignal(signal.SIGINT)
    signals.install(is_alone=False, speaks=False)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.wish == signal.SIGINT
    assert not ended
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [signal.SIGINT]
    signals.restore()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_that_goes_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(models, features, tmp_path, caplog):
    """So none of them is taken for its newest, or crowds its own out."""
    run, folders = RunFolder(tmp_path), [tmp_path / "checkpoints" / f"set_aside_{number}" for number in (1, 2)]
    fit(models, features, tmp_path, RunCheckpoint(1, keep=9), max_steps=4)
    (tmp_path / "config-step-00000003.yaml").touch()
    with caplog.at_level("INFO"):
        fit(models, features, tmp_path, RunCheckpoint(1, keep=2), max_steps=3, ckpt_path=run.checkpoint(2))
    assert steps(tmp_path) == [2, 3]
    kept = ["config-step-00000003.yaml", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert sorted(path.name for path in folders[0].iterdir()) == kept
    assert f"is in {folders[0]} now, and may be deleted" in caplog.text
    assert run.find_checkpoint("last", None, "max") == run.checkpoint(3)
    first = folders[0] / "step-00000003.ckpt"
    fit(models, features, tmp_path, RunCheckpoint(9), max_steps=4, ckpt_path=first)
    assert [path.name for path in folders[1].iterdir()] == ["step-00000003.ckpt"], "that of another line"
    assert_same_run(torch.load(folders[0] / "step-00000004.ckpt", weights_only=True), states(tmp_path, 4))


@pytest.mark.parametrize(
    ("ranks", "error", "is_saved"), [(1, OSError, True), (2, OSError, False), (2, FloatingPointError, True)]
)
def test_an_error_of_one_of_several_ranks_starts_no_save_that_the_others_have_no_part_in(
    monkeypatch, ranks, error, is_saved
):
    saved, checkpoint = [], RunCheckpoint()
    monkeypatch.setattr(checkpoint, "_save_last_step", lambda *_: saved.append(True))
    checkpoint._between_steps = True
    checkpoint.on_exception(SimpleNamespace(world_size=ranks, training=True), None, error("disk"))
    assert bool(saved) == is_saved


def test_the_evaluation_that_a_resumed_run_begins_with_is_left_when_asked(models, features, tmp_path):
    """A cluster's patience may be shorter than an evaluation."""
    settings = {"max_steps": 3, "limit_val_batches": 9, "val_check_interval": 1}
    with pytest.raises(RuntimeError):
        fit(models, features, tmp_path, InEvaluation(RuntimeError), RunCheckpoint(1), **settings)
    for folder in (tmp_path, tmp_path / "another"):  # which has no checkpoint of its own yet
        seen = InEvaluation(None)
        with pytest.raises(SystemExit):
            fit(models, features, folder, seen, RunCheckpoint(1), **settings,
                ckpt_path=RunFolder(tmp_path).checkpoint(1))  # fmt: skip
        assert seen.batches == 1
        assert steps(folder) == [1]


class InEvaluation(Callback):
    """Raises in the first batch of an evaluation, or sends SIGTERM."""

    def __init__(self, error) -> None:
        self.error, self.batches = error, 0

    def on_validation_batch_start(self, *args) -> None:
        self.batches += 1
        if self.error:
            raise self.error("stopped by the test")
        os.kill(os.getpid(), signal.SIGTERM)
