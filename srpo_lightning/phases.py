"""What a training step is at, told to whoever shows it: a step of a large model takes minutes."""

from collections.abc import Callable
from typing import TypeAlias

Listener: TypeAlias = Callable[[str], None]

_listeners: list[Listener] = []


def enter(phase: str) -> None:
    """Tell all listeners that a phase of a step begins.

    Args:
        phase: Name as a progress bar shows it: rollout, trained steps, decoding, reward, backward, optimizer step.
    """
    for listener in tuple(_listeners):
        listener(phase)


def listen(listener: Listener) -> Callable[[], None]:
    """Have a function called with the name of each phase, until what this returns is called."""
    _listeners.append(listener)

    def stop() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return stop
