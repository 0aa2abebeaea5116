"""Ctrl-C and SIGTERM as a wish that a run looks at between its steps."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

WISHES = (signal.SIGTERM, signal.SIGINT)
TOGETHER_S = 1.0
"""Seconds within which two Ctrl-C are one: a launcher passes on what the terminal has sent to every process."""

SAID = b"\nCtrl-C: the step is finished and saved first; again: leave at once, and lose it\n"


class StopSignals:
    """Notes the first signal; a second Ctrl-C ends the process there and then.

    In the place of Lightning's handler, which talks to the other ranks from within.
    """

    def __init__(self) -> None:
        self.wish: signal.Signals | None = None
        self._since_s = 0.0
        self._is_alone = self._speaks = True
        self._before: dict[signal.Signals, Any] = {}

    def install(self, is_alone: bool, speaks: bool) -> None:
        """Listen from here on.

        Args:
            is_alone: Whether there are no other ranks.
            speaks: Whether this rank tells what a Ctrl-C does.
        """
        self._is_alone, self._speaks = is_alone, speaks
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WISHES}

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s, is_first = time.monotonic(), self.wish is None
        if is_first:
            self.wish, self._since_s = signal.Signals(number), now_s
            if number == signal.SIGINT and self._speaks:
                os.write(2, SAID)  # a print may be what was interrupted
        if number != signal.SIGINT:
            return
        if is_first and self._is_alone:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which needs no interpreter that has the time
        elif now_s - self._since_s > TOGETHER_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
