"""Where something is measured, how large it is, and how memory is counted there.

Everything that only CUDA has is in this file.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, Protocol

import torch
from torch import nn

from srpo_lightning.jobs.estimate.memory import MemoryTracker


class Scale(NamedTuple):
    """What the same code is run with.

    Args:
        device: Kind of the device that is measured.
        size: Geometry of the models: `full` is that of published ones, `small` that of the built-in model.
        folder: Folder for what is written on the way.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    size: Literal["full", "small"] = "full"
    folder: str = "runs/gpu"

    @property
    def is_small(self) -> bool:
        """Whether the models are the built-in ones."""
        return self.size == "small"

    @property
    def torch_device(self) -> torch.device:
        """The device itself."""
        return torch.device(self.device)


class Memory(Protocol):
    """How a device tells what of its memory is taken, in bytes."""

    def counting(self, module: nn.Module) -> AbstractContextManager[None]:
        """Around what is counted, on a module whose models are loaded."""

    def start_peak(self) -> None:
        """Forget the highest point so far."""

    def peak(self) -> int:
        """The highest point of all tensors since `start_peak`."""

    def held(self) -> int:
        """What all tensors take now."""

    def device_bytes(self) -> Mapping[str, int]:
        """What the allocator has reserved, what all programs use of the device, and what it has."""


class CudaMemory:
    """By torch's allocator of CUDA memory."""

    def counting(self, module: nn.Module) -> AbstractContextManager[None]:
        """It counts all the time."""
        return nullcontext()

    def start_peak(self) -> None:
        """Take the present for the highest point."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """As the program has asked for it: without what the allocator keeps beside."""
        return torch.cuda.max_memory_allocated()

    def held(self) -> int:
        """As the program has asked for it."""
        return torch.cuda.memory_allocated()

    def device_bytes(self) -> Mapping[str, int]:
        """Of the first device."""
        free, total = torch.cuda.mem_get_info()
        return {"reserved": torch.cuda.memory_reserved(), "used": total - free, "device": total}


class CpuMemory:
    """By counting what operations return; for trying the parts where there is no GPU."""

    def __init__(self) -> None:
        self.tracker = MemoryTracker("", {})

    @contextmanager
    def counting(self, module: nn.Module) -> Iterator[None]:
        """Count the module's own tensors, and what operations return from then on."""
        self.tracker.label((*module.parameters(), *module.buffers()), "module")
        with self.tracker:
            yield

    def start_peak(self) -> None:
        """Forget it, and look at once."""
        self.tracker.peaks.clear()
        torch.empty(0)

    def peak(self) -> int:
        """Nothing, outside of `counting`."""
        return max((peak.total for peak in self.tracker.peaks.values()), default=0)

    def held(self) -> int:
        """As the last operation has left it; it forgets the highest point."""
        self.start_peak()
        return self.peak()

    def device_bytes(self) -> Mapping[str, int]:
        """Nothing that is asked here of a CPU."""
        return {}


def memory_of(device: torch.device) -> Memory:
    return CudaMemory() if device.type == "cuda" else CpuMemory()


def free_cached(device: torch.device) -> None:
    """Give the device what the allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare_in_float32() -> None:
    """Take float32 as float32 in convolutions too, in the whole process; torch's default there is TF32."""
    torch.backends.cudnn.allow_tf32 = False


class Peaks:
    """The highest point in each phase, in bytes: set `phase` as a step goes on."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.peaks: dict[str, int] = {}
        self._phase = ""

    @property
    def phase(self) -> str:
        """The running one."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        if self._phase:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.memory.peak())
        self.memory.start_peak()
        self._phase = name
