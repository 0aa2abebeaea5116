"""Where the time of a step goes, and how much of what the card can multiply is used; eager and compiled."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from jsonargparse import Namespace

from benchmarks.bare_step import synchronize
from benchmarks.gpu.recipes import new_module, new_step, settings_of
from benchmarks.gpu.scale import Scale
from benchmarks.meter import PHASES, by_phase, matrix_rate, model_flops
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.phases import ROLLOUT


def speed(scale: Scale, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Seconds of a micro-batch with an optimizer step, by phase; the rollout has as many steps as the recipe's.

    Yields:
        `eager` by phase and `in all`: seconds (medians), their share, model FLOPs without recomputation, and how much
        of the matrix rate that is; and `matrix rate` in FLOP/s, of products of square bfloat16 matrices in between.
        Then `compiled`, the same of compiled blocks at the same rate, with their seconds over the eager ones; and the
        seconds of the first compiled step, which compiles.
    """
    with settings_of("LoRA", scale, {f"{POLICY}.compile": True}) as config:
        flops = flops_of(config)
        module = new_module(config, scale)
        step = new_step(module, config)
        rate_now = partial(matrix_rate, module.device, torch.bfloat16, 64 if scale.is_small else None)

        def turns(stance: str) -> tuple[list[dict[str, float]], list[float]]:
            times, rates = by_phase(step, {"way": partial(torch.compiler.set_stance, stance)}, repeats, rate_now)
            return times["way"], rates

        times, rates = turns("force_eager")
        rate = median(rates)
        yield {"eager": (eager := rows_of(times, flops, rate)), "matrix rate": rate}
        start = time.perf_counter()
        step()
        synchronize(module.device)
        first = time.perf_counter() - start
        compiled = rows_of(turns("default")[0], flops, rate)
        for phase, own in compiled.items():
            if eager[phase]["seconds"]:
                own["over eager"] = own["seconds"] / eager[phase]["seconds"]
        yield {"compiled": compiled, "seconds of the first compiled step": first}


def flops_of(config: Namespace) -> dict[str, float]:
    """FLOPs of a step by phase; a rollout's are counted in one of its steps, for counting takes a second in each."""
    one = config.clone()
    one.model.objective.init_args.num_rollout_steps = 1
    flops = dict(model_flops(one))
    flops[ROLLOUT] *= config.model.objective.init_args.num_rollout_steps
    return flops


def rows_of(turns: list[dict[str, float]], flops: Mapping[str, float], rate: float) -> dict[str, dict[str, float]]:
    """A row for each phase, and for all."""
    total = median(sum(turn.values()) for turn in turns)
    seconds = {phase: median(turn.get(phase, 0.0) for turn in turns) for phase in PHASES}
    rows = {phase: share(seconds[phase], flops.get(phase, 0.0), total, rate) for phase in PHASES}
    return rows | {"in all": share(total, sum(flops.values()), total, rate)}


def share(seconds: float, flops: float, total: float, rate: float) -> dict[str, float]:
    """A row of the table."""
    used = flops / seconds / rate if seconds else 0.0
    return {"seconds": seconds, "share": seconds / total, "model FLOPs": flops, "of the matrix rate": used}
