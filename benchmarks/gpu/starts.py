"""Seconds from a folder of a whole model to weights on the device: in bfloat16, and in 4 bits at first and again."""

import resource
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from isal import isal_zlib
from torch import Tensor

from benchmarks.bare_step import synchronize
from benchmarks.gpu.scale import Scale, free_cached
from benchmarks.gpu.stand_ins import flux_stand_in
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
) -> tuple[float, dict[str, int]]:
    """Seconds to read transformer and VAE to the device; of weights in 4 bits the CRC-32 of each tensor by name."""
    policy = FluxPolicy(
        pretrained, 512, 512, "bfloat16", "bfloat16", adapter=Lora(rank=16), quantize=quantize, quantize_dir=folder
    )
    start = time.perf_counter()
    policy.load()
    policy.to(device)
    synchronize(device)
    seconds = time.perf_counter() - start
    state = policy.transformer.state_dict() if quantize == "nf4" else {}
    sums = {name: checksum(tensor) for name, tensor in state.items()}
    del policy, state
    free_cached(device)
    return seconds, sums


def checksum(tensor: Tensor) -> int:
    """Of its bytes."""
    return int(isal_zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy()))


def highest_memory() -> int:
    """Bytes of the machine's memory that this process has had so far, pages of files that it has mapped included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
