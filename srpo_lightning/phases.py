"""What a training step is at, told to whoever shows or measures it: a step of a large model takes minutes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

ROLLOUT, FORWARD, BACKWARD = "rollout", "transformer forward", "transformer backward"
DECODE, REWARD = "VAE decode", "reward"
STEP, AVERAGING = "optimizer step", "EMA update"
DRAWING = "drawing"

Listener: TypeAlias = Callable[[str], None]

_listeners: list[Listener] = []


@runtime_checkable  # beartype asks, where shapes are checked
class Phased(Protocol):
    """What wants to know which phase of a step it is."""

    phase: str


def enter(phase: str) -> None:
    """Tell all listeners that a phase of a step begins.

    Args:
        phase: Name, one of those above.
    """
    for listener in tuple(_listeners):
        listener(phase)


def enter_backward(phase: str, tensors: Iterable[Tensor]) -> None:
    """Tell all listeners that a phase is gone through backwards, once the gradient of one of its results is there."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: enter(phase))


def listen(listener: Listener) -> Callable[[], None]:
    """Have a function called with the name of each phase, until what this returns is called."""
    _listeners.append(listener)

    def stop() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return stop


@contextmanager
def followed_by(phased: Phased) -> Iterator[None]:
    """Set its `phase` to that of the step, as long as the context lasts."""
    stop = listen(lambda phase: setattr(phased, "phase", phase))
    try:
        yield
    finally:
        stop()
