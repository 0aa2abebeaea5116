"""One line that says how far a run is: drawn over on a terminal and in a notebook, now and then in a log file."""

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
LINE = "{desc} {n_fmt}/{total_fmt}, {elapsed} so far, {remaining} left{postfix}"
REDRAWN_S = 0.1
UNKNOWN_WIDTH = 100  # letters, where a terminal says that it has none


class StepBar(ProgressBar):
    """Shows the optimizer step, the time left, the loss, and what a long step or an evaluation is at.

    There is never more than one line. On a terminal and in a notebook it is drawn over, and messages stand above it. In
    a log file a line is added now and then, without control characters. The time left is the mean over what has been,
    so it counts evaluations.

    Args:
        seconds_between_lines: Seconds between two lines in a log file at least; the last step has one in any case.
    """

    def __init__(self, seconds_between_lines: NonNegativeFloat = 30.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self.is_enabled = True
        """By which Lightning's `print` knows whether there is a bar to print above."""

        self._is_live = False
        self._bar: Any = None
        self._held = ExitStack()
        self._drawn_s = 0.0
        self._numbers = self._part = self._doing = ""

    def enable(self) -> None:
        """Show bars."""
        self.is_enabled = True

    def disable(self) -> None:
        """Show none, as on all ranks but the first."""
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is not None and self._is_live:
            tqdm.write(" ".join(map(str, args)), file=sys.stdout)
        else:
            print(*args, **kwargs)

    def tell(self, doing: str) -> None:
        """Say what the present step is at."""
        self._doing = doing
        self._draw()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the evaluation of the base."""
        self._open("evaluation before training", trainer.num_sanity_val_batches, is_left=False)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Its line goes."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the run does, or goes on."""
        self._open("step", [max(trainer.max_steps, 0)], trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batches of a step."""
        count = trainer.accumulate_grad_batches
        self._part = f"batch {batch_idx % count + 1}/{count}" if count > 1 else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show step and loss."""
        if self._bar is not None:
            self._bar.n = trainer.global_step
            numbers = {name.rpartition("/")[2]: value for name, value in trainer.progress_bar_metrics.items()}
            self._numbers = ", ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
            self._part = self._doing = ""
            self._draw(is_last=trainer.global_step == self._bar.total)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show an evaluation of its own; one within training has a place in the step's line."""
        if not trainer.sanity_checking and trainer.state.fn != "fit":
            self._open("evaluation", trainer.num_val_batches)
        self._part = "evaluation" if self._is_within(trainer) else ""

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count its batches."""
        self._count(trainer, trainer.num_val_batches, args[3])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the step."""
        if trainer.state.fn != "fit":
            self._close()
        self._part = self._doing = ""
        self._draw()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show `test`, which is an evaluation."""
        self._open("evaluation", trainer.num_test_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count its batches."""
        self._count(trainer, trainer.num_test_batches, args[3])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show `predict`."""
        self._open("batches drawn", trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Count its batches."""
        self._count(trainer, trainer.num_predict_batches, args[3])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line; what is raised stands below it."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing open."""
        self._close()

    def _is_within(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _count(self, trainer: Trainer, batches: list[int | float], batch_idx: int) -> None:
        if self._bar is None:
            return
        if self._is_within(trainer):
            self._part = f"evaluation, batch {batch_idx + 1}/{int(sum(batches))}"
        else:
            self._bar.n = batch_idx + 1
        self._doing = ""
        self._draw(is_last=not self._is_within(trainer) and self._bar.n == self._bar.total)

    def _open(self, name: str, batches: list[int | float], initial: int = 0, *, is_left: bool = True) -> None:
        self._close()
        if not self.is_enabled:
            return
        self._is_live = can_be_drawn_over(sys.stdout)
        width = width_of(sys.stdout) if self._is_live else None
        total = sum(batches)
        self._bar = tqdm(
            desc=name,
            total=int(total) if 0 < total < float("inf") else None,
            initial=initial,
            leave=is_left,
            position=0,
            file=sys.stdout if self._is_live else io.StringIO(),
            ncols=UNKNOWN_WIDTH if width == 0 else None,
            dynamic_ncols=bool(width),
            bar_format=BAR if self._is_live else LINE,
        )
        if self._is_live:
            self._held.enter_context(messages_above())
        self._drawn_s = time.monotonic()

    def _draw(self, *, is_last: bool = False) -> None:
        if self._bar is None:
            return
        now_s = time.monotonic()
        if not is_last and now_s - self._drawn_s < (REDRAWN_S if self._is_live else self.seconds_between_lines):
            return
        self._drawn_s = now_s
        doing = ": ".join(filter(None, (self._part, self._doing)))
        self._bar.set_postfix_str(", ".join(filter(None, (self._numbers, doing))), refresh=False)
        if self._is_live:
            self._bar.refresh()
        else:
            print(self._bar, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._held.close()
        self._numbers = self._part = self._doing = ""


def can_be_drawn_over(stream: TextIO) -> bool:
    """Whether a line can be drawn again in its place: on a terminal, and in the output of a notebook's cell."""
    return stream.isatty() or type(stream).__module__ == "ipykernel.iostream"


def width_of(stream: TextIO) -> int | None:
    """Letters in a line of a terminal, 0 where it does not say; None where it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None


class Above:
    """A stream of a terminal whose lines are printed above the bar, not into it.

    Args:
        stream: Stream that is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write in place of the bar, which is drawn again below."""
        with tqdm.external_write_mode(file=sys.stdout):
            return self.stream.write(text)

    def flush(self) -> None:
        """Let nothing wait."""
        self.stream.flush()


@contextmanager
def messages_above() -> Iterator[None]:
    """For as long as this lasts, logs and warnings that go to the terminal are printed above the bar."""
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    handlers = {own for logger in (logging.root, *named) for own in logger.handlers}
    streams = {own: own.stream for own in handlers if isinstance(own, logging.StreamHandler) and is_shown(own.stream)}
    shown = warnings.showwarning

    def above(*args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode(file=sys.stdout):
            shown(*args, **kwargs)

    for handler, stream in streams.items():
        handler.setStream(Above(stream))
    warnings.showwarning = above
    try:
        yield
    finally:
        if warnings.showwarning is above:
            warnings.showwarning = shown
        for handler, stream in streams.items():
            if isinstance(handler.stream, Above):
                handler.setStream(stream)


def is_shown(stream: Any) -> bool:
    """Whether what is written to a stream stands where a bar is drawn over."""
    return hasattr(stream, "isatty") and not getattr(stream, "closed", False) and can_be_drawn_over(stream)
