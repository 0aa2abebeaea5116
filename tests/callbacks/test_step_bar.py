"""The line that says how far a run is: on a terminal, in a log file and in a notebook, within a long step too."""

import json
import logging
import os
import pty
import re
import sys
import termios
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from lightning.pytorch import LightningModule, Trainer
from nbclient import NotebookClient

from srpo_lightning import phases
from srpo_lightning.callbacks import Progress, StepBar, progress, step_bar
from srpo_lightning.callbacks.step_bar import can_be_drawn_over
from tests import tiny
from tests.processes import launch

ROOT = Path(__file__).parents[2]
ADVICE = ("Tip:", "FLOPs", "Epoch", "/-2")


def without_patience() -> None:
    """Steps of the tiny model take as long as long ones do, in the bar's eyes."""
    progress.PATIENCE_S = progress.EVERY_S = step_bar.REDRAWN_S = 0.0


@pytest.fixture
def config(models, features, tmp_path):
    """A run of four steps in eight batches, two evaluations and two checkpoints, as a file."""
    settings = tiny.config(models, tmp_path / "run", features)
    del settings["trainer"]["enable_progress_bar"], settings["trainer"]["enable_model_summary"]
    settings["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 4}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return str(tmp_path / "run.yaml")


def rendered(output: str) -> list[str]:
    """The lines that a terminal shows in the end, of what has no control characters but these two."""
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f]", output)
    lines = []
    for written in output.replace("\r\n", "\n").split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def terminal(columns: int) -> tuple[int, int]:
    """Both ends of a terminal of so many letters a line."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, columns))
    return ours, its


def on_terminal(arguments: list[str], columns: int = 150) -> str:
    """What a program has printed to a terminal."""
    ours, its = terminal(columns)
    output: list[str] = []
    process = launch(arguments, Path(os.ttyname(its)), {}, without_patience)
    reader = threading.Thread(target=lambda: output.append(everything(ours)))
    reader.start()
    process.join()
    os.close(its)
    reader.join()
    assert process.exitcode == 0, output
    return output[0]


def everything(terminal: int) -> str:
    """What a terminal shows until its other end is closed; this end is closed then."""
    pieces = []
    with suppress(OSError):  # which says that the other end is closed
        while piece := os.read(terminal, 4096):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_on_a_terminal_one_line_says_step_and_phase_and_messages_stand_alone(config):
    output = on_terminal(["fit", "--config", config])
    for told in (
        "evaluation before training",
        "batch 2/2: rollout 1/2",
        "transformer forward",
        "VAE decode",
        "reward",
        "transformer backward",
        "optimizer step",
        "evaluation, batch 1/2: drawing 1/",
    ):
        assert told in output, told
    assert not any(words in output for words in ADVICE)
    lines = rendered(output)
    steps = [line for line in lines if re.search(r"step \d/4", line)]
    assert len(steps) == 1, lines
    last = steps[0]
    assert re.match(r"step 4/4 \|\S+\| 0\d:\d\d<00:00, loss -?\d", last), last
    messages = [line for line in lines if "checkpoint: " in line]
    assert len(messages) == 2
    assert all(line.startswith("checkpoint: ") for line in messages)


def test_in_a_log_file_lines_are_added_without_control_characters(config, tmp_path):
    bar = ["--trainer.callbacks+=srpo_lightning.callbacks.StepBar", "--trainer.callbacks.seconds_between_lines", "0"]
    process = launch(["fit", "--config", config, *bar], tmp_path / "log", before=without_patience)
    process.join()
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0, output
    assert "\r" not in output
    assert not any(words in output for words in ADVICE)
    lines = rendered(output)
    assert any(
        re.match(r"step 1/4, 0\d:\d\d so far, \d\d:\d\d left, loss \S+, batch 1/2: rollout 1/2$", x) for x in lines
    )
    assert any(re.match(r"step 4/4, 0\d:\d\d so far, 00:00 left, loss -?\d\S+$", line) for line in lines)


def test_by_itself_a_log_file_of_a_short_run_has_the_last_step_alone(config, tmp_path):
    process = launch(["fit", "--config", config], tmp_path / "log")
    process.join()
    assert process.exitcode == 0
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("step ")]
    assert lines[-1].startswith("step 4/4, ")


def test_a_module_prints_beside_the_bar(capsys):
    """LightningModule.print asks the bar whether it is enabled."""
    bar = StepBar()
    module = LightningModule()
    module.trainer = Trainer(accelerator="cpu", callbacks=[bar], logger=False, enable_checkpointing=False)
    module.print("first")
    bar.disable()
    module.print("second")
    assert capsys.readouterr().out.endswith("first\nsecond\n")


CELL = """
from srpo_lightning.callbacks import progress, step_bar
from srpo_lightning.cli import main
progress.PATIENCE_S = progress.EVERY_S = step_bar.REDRAWN_S = 0.0
main(["fit", "--config", "{config}"])
"""


def test_in_a_notebook_the_line_is_drawn_over(config, tmp_path):
    cell = nbformat.v4.new_code_cell(CELL.format(config=config))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    output = "".join(own["text"] for own in cell.outputs if own.get("name") == "stdout")
    assert "rollout 1/2" in output
    (last,) = [line for line in rendered(output) if line.startswith("step ")]
    assert last.startswith("step 4/4 |")


def test_where_a_line_can_be_drawn_over(tmp_path):
    with (tmp_path / "log").open("w") as file:
        assert not can_be_drawn_over(file)


def test_nothing_listens_once_a_run_has_ended_and_warnings_are_shown_as_before(models, features, tmp_path):
    shown, streams = warnings.showwarning, handler_streams()
    trainer = tiny.new_trainer(tmp_path, [Progress(), StepBar()], max_steps=1, enable_progress_bar=True)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    assert not phases._listeners
    assert warnings.showwarning is shown
    assert streams.items() <= handler_streams().items()


def handler_streams() -> dict[logging.Handler, object]:
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    return {own: getattr(own, "stream", None) for logger in loggers for own in logger.handlers}


@pytest.mark.parametrize("columns", [0, 80])  # none: a terminal that does not say how wide it is
def test_a_warning_stands_above_the_bar(monkeypatch, columns):
    ours, its = terminal(columns)
    logger = logging.getLogger("of_this_test")
    with os.fdopen(its, "w", buffering=1) as stream, warnings.catch_warnings():
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(stream)])
        warnings.simplefilter("always")
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: stream.write(f"warning: {message}\n"))
        bar = StepBar()
        bar._open("step", [4])
        warnings.warn("odd", stacklevel=1)
        bar.print("printed")
        logger.warning("logged")
        bar._close()
        assert logger.handlers[0].stream is stream
    lines = rendered(everything(ours))
    assert lines[:3] == ["warning: odd", "printed", "logged"]
    assert lines[3].startswith("step 0/4 ")
