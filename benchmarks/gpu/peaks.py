"""The highest point of memory in each phase of a recipe's step, beside what `estimate` predicts."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves  # torch has no public name for it

from benchmarks.bare_step import synchronize
from benchmarks.gpu.isolated import CONTEXT, first_line
from benchmarks.gpu.recipes import new_module, new_step, settings_of
from benchmarks.gpu.scale import Peaks, Scale, memory_of
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.phases import followed_by

BETWEEN = 0.9, 1.1
"""Predicted over measured, of the highest phase: what passes."""


def peaks(scale: Scale, case: str) -> dict[str, Any]:
    """Measured and predicted peaks by phase, in bytes; the prediction runs on the CPU meanwhile.

    Returns:
        `measured`, `predicted`, and `ratio`, the highest of the latter over the highest of the former, with `passed`;
        or `out of memory`, which says how far the step came.
    """
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # of the process that is started here
            prediction = pool.submit(predicted, scale, case)
        found: dict[str, Any] = measured(scale, case)
        found["predicted"] = prediction.result()
    if "out of memory" in found:
        device = found.get("device", 0)
        return found | {"passed": max(found["predicted"].values()) > BETWEEN[0] * device}
    ratio = max(found["predicted"].values()) / max(found["measured"].values())
    return found | {"ratio": ratio, "passed": BETWEEN[0] <= ratio <= BETWEEN[1]}


def predicted(scale: Scale, case: str) -> dict[str, int]:
    """What `estimate` says of the device's kind."""
    with settings_of(case, scale) as config, quiet():
        tracker = predict(config, scale.device)
    return {phase: peak.total for phase, peak in tracker.peaks.items()}


def measured(scale: Scale, case: str) -> dict[str, Any]:
    """Of an optimizer step behind a first one; rollouts have two steps, for more have no higher peak."""
    memory = memory_of(scale.torch_device)
    counter = Peaks(memory)
    result: dict[str, Any] = {"measured": counter.peaks}
    try:
        with settings_of(case, scale) as config:
            if "num_rollout_steps" in config.model.objective.init_args:
                config.model.objective.init_args.num_rollout_steps = 2
            start = time.perf_counter()
            module = new_module(config, scale)
            synchronize(module.device)
            result["seconds to make the weights"] = time.perf_counter() - start
            with memory.counting(module):
                result["weights"] = memory.held()
                step = new_step(module, config)
                for _ in range(2):
                    counter.peaks.clear()
                    start = time.perf_counter()
                    with followed_by(counter):
                        step()
                    counter.phase = ""
                    synchronize(module.device)
                    result.setdefault("seconds of steps", []).append(time.perf_counter() - start)
            states = tree_leaves(list(step.optimizer.state.values()))
            result["optimizer states"] = sum(state.nbytes for state in states if isinstance(state, Tensor))
    except torch.OutOfMemoryError as error:
        result["out of memory"] = f"in: {counter.phase or 'making the weights'}. {first_line(error)}"
    return {**result, **memory.device_bytes()}
