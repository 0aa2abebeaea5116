"""How much each phase of a step takes: seconds, FLOPs, and the rate that they are held against."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.bare_step import BareStep
from srpo_lightning.config.arguments import new_module
from srpo_lightning.jobs.estimate.memory import MemoryTracker
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.prediction import eager, fake_conditions, make_fake, quiet, without_weights
from srpo_lightning.jobs.estimate.step import micro_batch
from srpo_lightning.phases import AVERAGING, BACKWARD, DECODE, FORWARD, REWARD, ROLLOUT, STEP, enter, followed_by
from srpo_lightning.training.timing import now, seconds_between

PHASES = (ROLLOUT, FORWARD, DECODE, REWARD, BACKWARD, STEP, AVERAGING)

ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""What torch's counter does not know."""


class Meter:
    """How much of something each phase takes: set `phase` as a step goes on.

    Args:
        read: how the meter stands.
        difference: how much is between two readings.
    """

    def __init__(self, read: Callable[[], Any], difference: Callable[[Any, Any], float]) -> None:
        self.read = read
        self.difference = difference
        self._readings: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        """The running one."""
        return self._readings[-1][0] if self._readings else ""

    @phase.setter
    def phase(self, name: str) -> None:
        self._readings.append((name, self.read()))

    def take(self) -> dict[str, float]:
        """The sums by phase since the last call."""
        self.phase = ""
        sums: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in zip(self._readings, self._readings[1:], strict=False):
            sums[name] += self.difference(start, end)
        self._readings = []
        return dict(sums)


def model_flops(config: Namespace) -> Mapping[str, float]:
    """FLOPs of a step by phase."""
    config = config.clone()
    eager(config)
    config[f"{POLICY}.gradient_checkpointing"] = config[f"{POLICY}.vae_checkpointing"] = False
    module = new_module(config)
    with quiet(), without_weights():
        module.configure_model()
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker("", {}):
        make_fake(module)
        conditions = fake_conditions(config, module.policy, config.data.batch_size)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            meter = Meter(counter.get_total_flops, lambda start, end: end - start)
            with followed_by(meter):
                loss = micro_batch(module, conditions, config.trainer.precision)
                enter(BACKWARD)
                loss.backward()
            return meter.take()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOPs per second of a product of square matrices, large ones unless a size is given."""
    turns = 10 if device.type == "cuda" else 5
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    start = now(device)
    for _ in range(turns):
        a @ b
    return turns * 2 * size**3 / seconds_between(start, now(device))


def by_phase(
    step: BareStep,
    ways: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    repeats: int,
    rate: Callable[[], float],
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Seconds of each phase, by way and turn, and the matrix rates in between."""
    device = step.module.device
    clock = Meter(partial(now, device), seconds_between)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    rates = []
    for turn in range(-2, repeats):  # two warm up: the second batch size makes sizes symbols
        for name, way in ways.items():
            with way(), followed_by(clock):
                step()
            seconds = clock.take()
            if turn >= 0:
                times[name].append(seconds)
        rates.append(rate())
    return times, rates
