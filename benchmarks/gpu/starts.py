"""Seconds from a folder of a whole model to weights on the device: in bfloat16, and in 4 bits at first and again."""

import resource
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.scale import Scale, free_cached
from benchmarks.gpu.stand_ins import flux_stand_in
from benchmarks.step import synchronize
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.adapters import Lora


def starts(scale: Scale) -> dict[str, Any]:
    """Read the policy three times; the first and the second start in 4 bits must give the same weights.

    A stand-in is written before where there is none. Its pages are in the machine's memory then, if that has room: what
    a disk adds is not in these numbers.
    """
    start = time.perf_counter()
    pretrained = flux_stand_in(scale)
    found: dict[str, Any] = {"seconds to write the stand-in": time.perf_counter() - start}
    rounded = Path(scale.folder) / "nf4"
    shutil.rmtree(rounded, ignore_errors=True)
    weights = []
    for name in ("first start in 4 bits", "second start in 4 bits"):
        seconds, fingerprint = read(pretrained, "nf4", str(rounded), scale.torch_device)
        found[name] = {"seconds": seconds, "highest memory of the process": highest_memory()}
        weights.append(fingerprint)
    seconds, _ = read(pretrained, "none", None, scale.torch_device)
    found["start in bfloat16"] = {"seconds": seconds, "highest memory of the process": highest_memory()}
    found["files in 4 bits"] = sum(file.stat().st_size for file in rounded.rglob("*.safetensors"))
    shutil.rmtree(rounded, ignore_errors=True)
    return found | {"passed": weights[0] == weights[1] and found["files in 4 bits"] > 0}


def read(
    pretrained: str, quantize: Literal["none", "nf4"], folder: str | None, device: torch.device
) -> tuple[float, dict[str, float]]:
    """Seconds to read transformer and VAE to the device, and the sums of all tensors' bytes by name."""
    policy = FluxPolicy(
        pretrained, 512, 512, "bfloat16", "bfloat16", adapter=Lora(rank=16), quantize=quantize, quantize_dir=folder
    )
    start = time.perf_counter()
    policy.load()
    policy.to(device)
    synchronize(device)
    seconds = time.perf_counter() - start
    sums = {name: sum_of(tensor) for name, tensor in policy.transformer.state_dict().items()}
    del policy
    free_cached(device)
    return seconds, sums


def sum_of(tensor: Tensor) -> float:
    """Of the numbers, those in 4 bits as the bytes that hold them."""
    return float(tensor.detach().to(torch.float64).sum())


def highest_memory() -> int:
    """Bytes of the machine's memory that this process has had so far, pages of files that it has mapped included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
