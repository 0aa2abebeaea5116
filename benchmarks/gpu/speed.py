"""Where the time of a step goes, and how much of what the card can multiply is used; eager and compiled."""

import time
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.bare_step import synchronize
from benchmarks.gpu.recipes import new_module, new_step, settings_of
from benchmarks.gpu.scale import Scale
from benchmarks.meter import PHASES, Meter, by_phase, matrix_rate, model_flops
from srpo_lightning.jobs.estimate.job import POLICY
from srpo_lightning.jobs.estimate.step import phases
from srpo_lightning.training.timing import now, seconds_between


def speed(scale: Scale, case: str = "LoRA", repeats: int = 3, compile: bool = False) -> dict[str, Any]:
    """Seconds of a micro-batch with an optimizer step, by phase; the rollout has as many steps as the recipe's.

    Returns:
        `phases` by name: seconds (medians), their share, model FLOPs without recomputation, and how much of the
        matrix rate that is; `matrix rate` in FLOP/s, of products of square bfloat16 matrices in between; the sums as
        `step`; and the seconds of the first step, which compiles.
    """
    with settings_of(case, scale, {f"{POLICY}.compile": compile}) as config:
        flops = model_flops(config)
        module = new_module(config, scale)
        step = new_step(module, config)
        start = time.perf_counter()
        with phases(module, clock := Meter(partial(now, module.device), seconds_between)):
            step(clock)
        synchronize(module.device)
        first = time.perf_counter() - start
        size = 64 if scale.is_small else None
        rate_now = partial(matrix_rate, module.device, torch.bfloat16, size)
        times, rates = by_phase(step, {"way": partial(torch.compiler.set_stance, "default")}, repeats, rate_now)
    rate, turns = median(rates), times["way"]
    seconds = {phase: median(turn.get(phase, 0.0) for turn in turns) for phase in PHASES}
    total = median(sum(turn.values()) for turn in turns)
    return {
        "phases": {phase: share(seconds[phase], flops.get(phase, 0.0), total, rate) for phase in PHASES},
        "step": share(total, sum(flops.values()), total, rate),
        "matrix rate": rate,
        "seconds of the first step": first,
    }


def share(seconds: float, flops: float, total: float, rate: float) -> dict[str, float]:
    """A row of the table."""
    used = flops / seconds / rate if seconds else 0.0
    return {"seconds": seconds, "share": seconds / total, "model FLOPs": flops, "of the matrix rate": used}
