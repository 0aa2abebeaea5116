"""What a rank takes of the machine's own memory, beside that of its device."""

import psutil
from torch import nn
from torch.distributed.tensor import DTensor

from srpo_lightning.jobs.estimate.memory import MemoryTracker
from srpo_lightning.jobs.estimate.units import GIB
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import loading

INTERPRETER = GIB // 2
"""Of Python with all libraries, before any model is read; measured, without a CUDA context."""


def reading_bytes(module: SRPOModule) -> int:
    """What a rank has there when its models are read, before they move to the device.

    Parts that ranks divide are read straight to their devices. Blocks in 4 bits are rounded one by one, the last of
    them beside all others. Pages of files that the system takes back when it needs them are not counted.

    Args:
        module: Module whose models are loaded, with or without memory.
    """
    tensors = (*module.parameters(), *module.buffers())
    whole = sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, DTensor))
    return whole + max(_unrounded_bytes(module.policy), default=0)


def _unrounded_bytes(policy: nn.Module) -> list[int]:
    if getattr(policy, "quantize", "none") == "none":
        return []
    outline = loading.cast(policy.empty_transformer(), policy.dtype)  # type: ignore[operator, arg-type]
    return [sum(parameter.nbytes for parameter in block.parameters()) for _, block in loading.blocks(outline)]


def host_peak(tracker: MemoryTracker, ranks: int) -> int:
    """Bytes of the machine at the highest of both phases, for so many ranks on it."""
    return ranks * (INTERPRETER + max(tracker.reading_bytes, tracker.host_bytes))


def machine_memory() -> int:
    """Bytes of memory that the ranks on this machine share."""
    return int(psutil.virtual_memory().total)
