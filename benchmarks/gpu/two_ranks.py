"""Whether two processes that divide a model by FSDP2 on one card make the step that one makes alone.

NCCL refuses two ranks on one device; gloo takes their tensors through the machine's memory. That is slow, and nothing
is timed: it shows that parameters are gathered, gradients averaged and divided parts stepped as they should be.
"""

import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks.bare_step import load
from benchmarks.gpu.correctness import FLOAT32, Way, configuration
from benchmarks.gpu.isolated import CONTEXT, first_line
from benchmarks.gpu.one_step import Step, accumulate, differences, finish_step
from benchmarks.gpu.recipes import new_conditions
from benchmarks.gpu.scale import Scale, compare_in_float32
from benchmarks.gpu.stand_ins import flux_stand_in
from srpo_lightning.config.arguments import new_module
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.strategies import ShardedStrategy

RANKS = 2
WAY = Way("all weights", "float32")
COMPARED = ("loss", "gradient", "update")


def two_ranks(scale: Scale) -> dict[str, Any]:
    """A step of two micro-batches: one process accumulates both, and each of two ranks makes one."""
    compare_in_float32()
    flux_stand_in(scale, blocks=1)  # before any two could write it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [CONTEXT.Process(target=_rank, args=(folder, rank, scale)) for rank in range(RANKS)]  # type: ignore[attr-defined]
        for process in processes:
            process.start()
        reference = alone(scale)
        while running := [process.sentinel for process in processes if process.is_alive()]:
            wait(running)
            if any(process.exitcode for process in processes):  # the other one would wait for it
                for process in processes:
                    process.kill()
        if statuses := [process.exitcode for process in processes if process.exitcode]:
            told = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.error"))]
            return {"could not be tried": (told or [f"a rank ended with status {statuses[0]}"])[0]}
        steps = [Step(**torch.load(folder / f"{rank}.pt", weights_only=True)) for rank in range(RANKS)]
    measured = {name: found for name, found in differences(joined(steps), reference).items() if name in COMPARED}
    allowed = {name: FLOAT32[name] for name in COMPARED}
    passed = all(measured[name] <= allowed[name] for name in COMPARED)
    return {"measured": measured, "allowed": allowed, "passed": passed}


def joined(parts: list[Step]) -> Step:
    """The step of all ranks: FSDP2 has divided each tensor along its first dimension."""

    def whole(of_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([own[name] for own in of_ranks]) for name in of_ranks[0]}

    loss = sum(part.loss for part in parts) / len(parts)
    return Step(loss, whole([part.gradients for part in parts]), whole([part.updates for part in parts]), {})


def alone(scale: Scale) -> Step:
    """Both micro-batches in one process, without sharding."""
    with configuration(WAY, scale) as config:
        module = load(config, scale.torch_device, "small")
        loss = 0.0
        for module.micro_step in range(RANKS):
            loss += accumulate(module, config, new_conditions(module, config)) / RANKS
    for _, parameter in module.trainable_parameters():
        if parameter.grad is not None:
            parameter.grad /= RANKS
    return finish_step(module, module.configure_optimizers(), loss)


def _rank(folder: Path, rank: int, scale: Scale) -> None:
    try:
        step = step_of_rank(rank, folder / "meeting", scale)
    except BaseException as error:
        (folder / f"{rank}.error").write_text(first_line(error), encoding="utf-8")
        raise
    torch.save(step._asdict(), folder / f"{rank}.pt")


def step_of_rank(rank: int, meeting: Path, scale: Scale) -> Step:
    """One of the micro-batches; of the result each tensor is this rank's part."""
    compare_in_float32()
    if scale.device == "cuda":
        torch.cuda.set_device(0)  # the same one for every rank
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=RANKS)
    try:
        with configuration(WAY, scale) as config:
            module = divided(new_module(config), scale)
            module.micro_step = rank
            loss = accumulate(module, config, new_conditions(module, config))
        return finish_step(module, module.configure_optimizers(), loss)
    finally:
        distributed.destroy_process_group()


def divided(module: SRPOModule, scale: Scale) -> SRPOModule:
    """The module with its models read, the transformer's weights divided as `fit` does it."""
    strategy = ShardedStrategy(shard_size=RANKS)
    device = torch.device("cuda", 0) if scale.device == "cuda" else torch.device("cpu")
    strategy.parallel_devices = [device] * RANKS
    strategy.make_mesh(device.type)
    module.policy.load(strategy.shard)
    module.reward.load()
    return module.to(device)
