"""AdamW by several libraries on weights on the device: seconds, memory, and how far their updates are from torch's."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.gpu.isolated import first_line
from benchmarks.gpu.passes import seconds_of
from benchmarks.gpu.recipes import settings_of
from benchmarks.gpu.scale import Memory, Scale, memory_of
from benchmarks.optimizers import distance, optimizer_classes
from srpo_lightning.config.arguments import new_module
from srpo_lightning.jobs.estimate.prediction import quiet
from srpo_lightning.policies.loading import blocks


def optimizer_steps(scale: Scale) -> dict[str, Any]:
    """Of the weights of the transformer's first block of each kind.

    The updates of float32 weights in three steps are held against those of torch.optim.AdamW: their distance over the
    length of the latter.
    """
    with settings_of("all weights, 8-bit states", scale) as config, quiet():
        policy: Any = new_module(config).policy
        outline = policy.outline()
    first = [block for name, block in blocks(outline) if name.endswith(".0")]
    shapes = [parameter.shape for block in first for parameter in block.parameters()]
    memory = memory_of(scale.torch_device)  # on a CPU nothing is counted: compiled steps do not bear it
    found: dict[str, Any] = {}
    reference: list[Tensor] = []
    for name, make in optimizer_classes().items():
        try:
            start = time.perf_counter()
            updates = updates_of(make, shapes, scale.torch_device)
            reference = reference or updates
            own = {"seconds of the first steps": time.perf_counter() - start, "distance": distance(updates, reference)}
            del updates
            found[name] = own | step_cost(make, shapes, scale.torch_device, memory)
        except Exception as error:  # of compiled kernels there are many kinds
            found[name] = {"error": first_line(error)}
    return {"optimizers": found, "numbers": sum(shape.numel() for shape in shapes)}


def new_parameters(shapes: list[torch.Size], dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """Random weights with random gradients, the same in every call."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-4 * torch.randn_like(parameter)
    return parameters


def updates_of(
    make: Callable[[list[Tensor]], Optimizer], shapes: list[torch.Size], device: torch.device
) -> list[Tensor]:
    """By how much three steps change float32 weights."""
    parameters = new_parameters(shapes, torch.float32, device)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make([*parameters])
    for _ in range(3):
        optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


def step_cost(
    make: Callable[[list[Tensor]], Optimizer], shapes: list[torch.Size], device: torch.device, memory: Memory
) -> dict[str, float]:
    """Seconds of a step on bfloat16 weights; bytes of states, and of what a step needs beside them."""
    parameters = new_parameters(shapes, torch.bfloat16, device)
    optimizer = make([*parameters])
    before = memory.held()
    optimizer.step()
    held = memory.held()
    memory.start_peak()
    seconds = seconds_of(optimizer.step, device)
    return {"seconds": seconds, "states": held - before, "beside": memory.peak() - held}
