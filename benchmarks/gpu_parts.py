"""What `benchmarks.gpu` measures; each function runs alone in a process and returns numbers for JSON.

Models have FLUX.1-dev's and HPSv2.1's shapes and random weights, which are made on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.memory import changed
from benchmarks.optimizers import distance, optimizer_classes
from benchmarks.step import BareStep, Meter, by_phase, load, matrix_rate, model_flops, on_device
from srpo_lightning.batch import Conditions
from srpo_lightning.config.arguments import new_module
from srpo_lightning.flow import inject
from srpo_lightning.jobs.estimate.job import POLICY, local_files
from srpo_lightning.jobs.estimate.prediction import fake_conditions, predict, quiet
from srpo_lightning.jobs.estimate.step import phases
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.loading import blocks
from srpo_lightning.policies.parallel import ATTENTION, check_attention
from srpo_lightning.training.timing import now, seconds_between

DEVICE = torch.device("cuda")
LORA, QLORA, ALL = (f"configs/flux_srpo_{name}.yaml" for name in ("lora", "qlora", "1gpu"))
WITHOUT_AVERAGE = {"trainer.callbacks": None}
"""An average in host memory takes none of the device's."""


def objective(name: str, **settings: Any) -> dict[str, object]:
    """Another objective, its rollout as short as it can be: its length changes no peak."""
    class_path = f"srpo_lightning.objectives.{name}"
    return {"model.objective": Namespace(class_path=class_path, init_args=Namespace(**settings, reward_batch_size=1))}


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "LoRA": (LORA, {}),
    "QLoRA, 512 px": (QLORA, {}),
    "LoRA, ReFL": (LORA, objective("ReFL", num_steps=4, late_steps=(3, 3))),
    "LoRA, DRaFT-LV": (LORA, objective("DRaFT", num_steps=4, num_variants=2)),
    "LoRA, 256 px, no gradient checkpointing": (
        LORA,
        {f"{POLICY}.gradient_checkpointing": False, f"{POLICY}.height": 256, f"{POLICY}.width": 256},
    ),
    "all weights, 8-bit states, stepped in the backward pass": (
        ALL,
        WITHOUT_AVERAGE
        | {
            "model.optimizer_in_backward": True,
            "trainer.accumulate_grad_batches": 1,
            "trainer.gradient_clip_val": None,
        },
    ),
    "all weights, 8-bit states": (ALL, WITHOUT_AVERAGE),
}
"""Recipes by name: the configuration that they start from, and what is changed in it."""


@contextmanager
def settings_of(case: str) -> Iterator[Namespace]:
    """The configuration of a case, with folders of small files in the place of published models."""
    config = changed(*CASES[case])
    with local_files(config):
        yield config


class Peaks:
    """The allocator's highest point in each phase, in bytes: set `phase` as a step goes on."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase = ""

    @property
    def phase(self) -> str:
        """The running one."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        if self._phase:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        self._phase = name


def prediction(case: str) -> dict[str, Any]:
    """What `estimate` predicts for a case, by phase, in bytes."""
    with settings_of(case) as config, quiet():
        tracker = predict(config)
    return {phase: peak.total for phase, peak in tracker.peaks.items()}


def memory(case: str) -> dict[str, Any]:
    """Peaks of an optimizer step behind a first one, by phase, in bytes; of one that does not fit, how far it came."""
    peaks = Peaks()
    result: dict[str, Any] = {"peaks": peaks.peaks}
    try:
        with settings_of(case) as config:
            if "num_rollout_steps" in config.model.objective.init_args:
                config.model.objective.init_args.num_rollout_steps = 2
            start = time.perf_counter()
            module = load(config, DEVICE, "flux")
            result["seconds to make the weights"] = time.perf_counter() - start
            result["weights"] = torch.cuda.memory_allocated()
            step = new_step(module, config)
            for _ in range(2):
                peaks.peaks.clear()
                start = time.perf_counter()
                with phases(module, peaks):
                    step(peaks)
                peaks.phase = ""
                result.setdefault("first step", dict(peaks.peaks))
                torch.cuda.synchronize()
                result.setdefault("seconds of steps", []).append(time.perf_counter() - start)
            result["states"] = sum(
                t.nbytes for t in tree_leaves(list(step.optimizer.state.values())) if isinstance(t, Tensor)
            )
    except torch.OutOfMemoryError as error:
        result["out of memory"] = f"in: {peaks.phase or 'making the weights'}. {str(error).splitlines()[0]}"
    free, total = torch.cuda.mem_get_info()
    return result | {"reserved": torch.cuda.max_memory_reserved(), "used": total - free, "device": total}


def new_step(module: SRPOModule, config: Namespace) -> BareStep:
    """A step as the recipe's accumulation leaves it: with the gradients of the micro-batch before."""
    step = BareStep(module, config, new_conditions(module, config), module.configure_optimizers())
    step.accumulates = config.trainer.accumulate_grad_batches > 1
    return step


def new_conditions(module: SRPOModule, config: Namespace) -> Conditions:
    """A batch with text features that are no zeros, with which products of matrices would be faster."""
    conditions = on_device(fake_conditions(config, module.policy, config.data.batch_size), module.device)
    return conditions._replace(text=conditions.text.each(torch.randn_like))


def speed(case: str = "LoRA", repeats: int = 3, compile: bool = False) -> dict[str, Any]:
    """Seconds and model FLOPs of a step by phase, eager or with compiled blocks."""
    with settings_of(case) as config:
        flops = model_flops(config)
        config[f"{POLICY}.compile"] = compile
        module = load(config, DEVICE, "flux")
        step = new_step(module, config)
        start = time.perf_counter()
        with phases(module, clock := Meter(partial(now, module.device), seconds_between)):
            step(clock)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        way = {"way": lambda: torch.compiler.set_stance("default")}
        times, rates = by_phase(step, way, repeats, partial(matrix_rate, module.device, torch.bfloat16))
    return {"seconds": times["way"], "rates": rates, "flops": dict(flops), "first step": first}


def fresh_inputs(module: SRPOModule, conditions: Conditions, batch_size: int) -> tuple[Tensor, Tensor, Conditions]:
    """Latents at random levels of noise, the levels, and as many conditions."""
    shape = (batch_size, *module.policy.latent_shape(conditions.size))
    x0, noise = torch.randn(shape, device=module.device), torch.randn(shape, device=module.device)
    sigma = torch.rand(batch_size, device=module.device) * 0.8 + 0.1
    return inject(x0, noise, sigma), sigma, conditions.take(slice(1)).repeat(batch_size)


def seconds_of(function: Callable[[], object], repeats: int = 5) -> float:
    """The median, behind a call that warms up."""
    times = []
    function()
    for _ in range(repeats):
        start = now(DEVICE)
        function()
        times.append(seconds_between(start, now(DEVICE)))
    return median(times)


def transformer_times(module: SRPOModule, conditions: Conditions) -> dict[str, float]:
    """Seconds of a rollout step of one sample, and of a forward and a backward pass of two; bytes at their peak."""
    one, two = (fresh_inputs(module, conditions, size) for size in (1, 2))

    def rollout_step() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            module.policy(*one, 1.0)

    def trained_step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = module.policy(*two, 3.5).square().mean()
        loss.backward()
        module.zero_grad()

    times = {"rollout step": seconds_of(rollout_step)}
    torch.cuda.reset_peak_memory_stats()
    times["trained step"] = seconds_of(trained_step, 3)
    return times | {"peak": float(torch.cuda.max_memory_allocated())}


def kernels(case: str = "LoRA", names: Sequence[str] = ATTENTION) -> dict[str, Any]:
    """Times of the transformer under each attention kernel that is installed."""
    with settings_of(case) as config:
        module = load(config, DEVICE, "flux")
        conditions = new_conditions(module, config)
        found: dict[str, Any] = {}
        for name in names:
            try:
                check_attention(name)
                module.policy.transformer.set_attention_backend(name)
                found[name] = transformer_times(module, conditions)
            except Exception as error:  # of compiled code there are many kinds
                found[name] = {"error": str(error).splitlines()[0]}
    return found


def checkpointing(sides: tuple[int, ...] = (720, 512, 256)) -> dict[str, Any]:
    """Times of the transformer with and without recomputing its blocks, by the pictures' side in pixels."""
    found: dict[str, Any] = {}
    with settings_of("LoRA") as config:
        module = load(config, DEVICE, "flux")
        transformer = module.policy.transformer
        for side in sides:
            conditions = new_conditions(module, config)._replace(size=(side, side))
            transformer.enable_gradient_checkpointing()
            found[f"{side} px"] = {"with": transformer_times(module, conditions)}
            transformer.disable_gradient_checkpointing()
            try:
                found[f"{side} px"]["without"] = transformer_times(module, conditions)
            except torch.OutOfMemoryError:
                found[f"{side} px"]["without"] = {"error": "out of memory"}
            module.zero_grad()
            torch.cuda.empty_cache()
    return found


def optimizers(num_blocks: int = 1) -> dict[str, Any]:
    """Times, memory and updates of AdamW on the bfloat16 weights of so many blocks of each kind.

    The updates of float32 weights in three steps are held against those of torch.optim.AdamW: their distance over the
    length of the latter.
    """
    with settings_of("all weights, 8-bit states") as config, quiet():
        outline = new_module(config).policy.outline()
    kinds = {"transformer_blocks": num_blocks, "single_transformer_blocks": num_blocks}
    named = [(name, block) for name, block in blocks(outline) if int(name.split(".")[1]) < kinds[name.split(".")[0]]]
    shapes = [parameter.shape for _, block in named for parameter in block.parameters()]
    found: dict[str, Any] = {"numbers": sum(shape.numel() for shape in shapes)}
    reference: list[Tensor] = []
    for name, make in optimizer_classes().items():
        try:
            own = {"compile": -time.perf_counter()}
            updates = updates_of(make, shapes)
            reference = reference or updates
            own["compile"] += time.perf_counter()
            own["distance"] = distance(updates, reference)
            del updates
            found[name] = own | step_cost(make, shapes)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return found


def new_parameters(shapes: list[torch.Size], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Random weights with random gradients, the same in every call."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-4 * torch.randn_like(parameter)
    return parameters


def updates_of(make: Callable[[list[Tensor]], Optimizer], shapes: list[torch.Size]) -> list[Tensor]:
    """By how much three steps change float32 weights."""
    parameters = new_parameters(shapes, torch.float32)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make([*parameters])
    for _ in range(3):
        optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


def step_cost(make: Callable[[list[Tensor]], Optimizer], shapes: list[torch.Size]) -> dict[str, float]:
    """Seconds of a step on bfloat16 weights; bytes of states, and of what a step needs beside them."""
    parameters = new_parameters(shapes, torch.bfloat16)
    optimizer = make([*parameters])
    before = torch.cuda.memory_allocated()
    optimizer.step()
    states = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    seconds = seconds_of(optimizer.step)
    return {"seconds": seconds, "states": states, "meanwhile": torch.cuda.max_memory_allocated() - held}
