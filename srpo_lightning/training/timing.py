"""Times of what a device does, taken without making the host wait for it."""

import time
from typing import TypeAlias

import torch

Moment: TypeAlias = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """The moment when the device will have done all that it was given so far; on a CPU that is now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """The seconds from one moment of a device to a later one, for which this waits."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float), "both moments are of one device"
        assert isinstance(end, float), "both moments are of one device"
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
