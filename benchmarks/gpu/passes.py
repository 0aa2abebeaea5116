"""Seconds of single passes of the transformer: by attention kernel, and with and without recomputing its blocks."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.correctness import installed
from benchmarks.gpu.isolated import first_line
from benchmarks.gpu.recipes import attention_kernel, fresh_inputs, new_conditions, new_module, settings_of
from benchmarks.gpu.scale import Memory, Scale, free_cached, memory_of
from srpo_lightning.batch import Conditions
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.timing import now, seconds_between


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median, behind a call that warms up."""
    times = []
    function()
    for _ in range(repeats):
        start = now(device)
        function()
        times.append(seconds_between(start, now(device)))
    return median(times)


def times_of_passes(module: SRPOModule, conditions: Conditions, memory: Memory, repeats: int = 5) -> dict[str, float]:
    """Seconds of a pass of one sample without gradient, and of a forward and a backward pass of two; their peak."""
    one, two = (fresh_inputs(module, conditions, size) for size in (1, 2))
    kind = module.device.type

    def rollout_step() -> None:
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
            module.policy(*one, 1.0)

    def trained_step() -> None:
        with torch.autocast(kind, torch.bfloat16):
            loss = module.policy(*two, 3.5).square().mean()
        loss.backward()
        module.zero_grad()

    times = {"rollout step": seconds_of(rollout_step, module.device, repeats)}
    memory.start_peak()
    times["trained step"] = seconds_of(trained_step, module.device, repeats)
    return times | {"peak": float(memory.peak())}


def attention_kernels(scale: Scale, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Times of the transformer under each attention kernel that is installed, LoRA recipe."""
    memory = memory_of(scale.torch_device)
    found: dict[str, Any] = {}
    with settings_of("LoRA", scale) as config:
        module = new_module(config, scale)
        conditions = new_conditions(module, config)
        with memory.counting(module):
            for name in installed() if names is None else names:
                try:
                    with attention_kernel(module, name):
                        found[name] = times_of_passes(module, conditions, memory)
                except Exception as error:  # of compiled code there are many kinds
                    found[name] = {"error": first_line(error)}
                module.zero_grad()
                free_cached(module.device)
    return {"kernels": found}


def checkpointing(scale: Scale, sides: Sequence[int] = (720, 512, 256)) -> dict[str, Any]:
    """Times with and without recomputing blocks in the backward pass, by the pictures' side in pixels."""
    memory = memory_of(scale.torch_device)
    found: dict[str, Any] = {}
    with settings_of("LoRA", scale) as config:
        module = new_module(config, scale)
        transformer: Any = module.policy.transformer
        with memory.counting(module):
            for side in (32, 64) if scale.is_small else sides:
                conditions = new_conditions(module, config)._replace(size=(side, side))
                for name, switch in (
                    ("with", transformer.enable_gradient_checkpointing),
                    ("without", transformer.disable_gradient_checkpointing),
                ):
                    switch()
                    try:
                        found[f"{side} px, {name}"] = times_of_passes(module, conditions, memory, 3)
                    except torch.OutOfMemoryError:
                        found[f"{side} px, {name}"] = {"error": "out of memory"}
                    module.zero_grad()
                    free_cached(module.device)
    return {"sizes": found}
