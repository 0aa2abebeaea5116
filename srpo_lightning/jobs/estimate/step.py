"""An optimizer step and an evaluation in the order of calls in which Lightning makes them, each phase by its name."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves  # torch has no public name for the tensors in nested states

from srpo_lightning import phases
from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import EMA
from srpo_lightning.draws import Draws
from srpo_lightning.jobs.estimate.devices import is_sharded, num_devices
from srpo_lightning.jobs.estimate.memory import HOST, MemoryTracker
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.clips import FRAMES
from srpo_lightning.rewards.base import Reward, evaluated_by

TRAINED, FROZEN, JUDGES = "trained weights", "frozen weights", "judges of evaluation"
GRADIENTS, STATES, AVERAGE = "gradients", "optimizer states", "EMA"
BATCH, BUCKETS, CASTS = "text features", "gradient buckets of DDP", "weights cast by autocast"
EVALUATION = "evaluation"
LASTING = (TRAINED, FROZEN, GRADIENTS, STATES, AVERAGE, BATCH, BUCKETS, JUDGES)


class LastFrames(Draws):
    """Draws by which a reward sees the last frames of a clip, so that all of it is decoded: the most memory."""

    def subset(self, purpose: str, weights: Sequence[float], count: int) -> list[int]:
        """The last places in the order of frames; others as they are drawn."""
        return list(range(len(weights)))[-count:] if purpose == FRAMES else super().subset(purpose, weights, count)


def train(
    module: SRPOModule,
    conditions: Conditions,
    trainer: Namespace,
    ema: EMA | None,
    tracker: MemoryTracker,
    *,
    on_cuda: bool,
) -> list[Any]:
    """An optimizer step as Lightning makes it, in the state that the one before has left.

    Args:
        module: Module with its models loaded.
        conditions: Conditions of a batch.
        trainer: Settings of the trainer: precision, accumulate_grad_batches and gradient_clip_val count.
        ema: Callback EMA, if there is one.
        tracker: Tracker, which labels what it counts by phase.
        on_cuda: Whether CUDA is what the fake tensors stand for.

    Returns:
        What holds on to memory between steps, beside the module and the ema.
    """
    parameters = [p for _, p in module.trainable_parameters()]
    offloads = is_sharded(trainer) and trainer.strategy.init_args.cpu_offload
    trained_label, gradient_label, state_label = [HOST] * 3 if offloads else [TRAINED, GRADIENTS, STATES]
    tracker.label(parameters, trained_label)
    for tensor in (t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad):
        tracker.label([tensor], HOST if offloads and isinstance(tensor, DTensor) else FROZEN)
    tracker.label((t for t in tree_leaves(conditions) if isinstance(t, Tensor)), BATCH)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.label([p.grad], gradient_label))
    progress: Any = SimpleNamespace(global_step=0)
    with tracker, phases.followed_by(tracker):
        if ema:
            ema.on_fit_start(progress, module)
            tracker.label(ema.weights.values(), AVERAGE if ema.device == "same" and not offloads else HOST)
        has_buckets = num_devices(trainer) > 1 and not is_sharded(trainer)
        buckets = [torch.zeros_like(parameter) for parameter in parameters if has_buckets]
        tracker.label(buckets, BUCKETS)
        # After a first step there are optimizer states, and gradients until the next backward pass frees them.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = new_optimizer(module, parameters, on_cuda=on_cuda)
        step(optimizer, None, parameters, tracker, state_label)
        tracker.label((p.grad for p in parameters if p.grad is not None), gradient_label)
        if module.optimizer_in_backward:
            module.zero_grad()
        tracker.peaks.clear()
        loss = micro_batch(module, conditions, trainer.precision, LastFrames)
        if trainer.accumulate_grad_batches == 1:
            module.zero_grad()  # before the backward pass and no sooner: so does Lightning
        phases.enter(phases.BACKWARD)
        loss.backward()
        del loss
        step(optimizer, trainer.gradient_clip_val, parameters, tracker, state_label)
        if ema:
            progress.global_step = ema.every_n_steps
            ema.on_train_batch_end(progress, module, None, conditions, 0)
    return [optimizer, buckets]


def evaluate(
    module: SRPOModule, judges: list[Reward], conditions: Conditions, precision: str, tracker: MemoryTracker
) -> None:
    """What an evaluation has on the device at once: the judges, and a sampling step, the pictures or their scores."""
    module.zero_grad()  # so does Lightning
    for judge in judges:
        tracker.label((*judge.parameters(), *judge.buffers()), JUDGES)
    tracker.phase = EVALUATION
    with tracker, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            latents = module.objective.rollout(module.policy, conditions, Draws(module.seed)).x0
            images = module.policy.decode(latents[: conditions.batch_size], conditions.size)  # a group has more
        for judge in judges:
            evaluated_by(judge, images.float(), range(module.policy.num_frames), judge.under(conditions.prompts))


def new_optimizer(module: SRPOModule, parameters: list[torch.nn.Parameter], *, on_cuda: bool) -> Optimizer:
    """The module's, with the kernels that it would choose.

    Of parameters that are divided it steps this rank's parts as ordinary tensors. They take the same memory, without
    what takes DTensor a minute for twelve billion: working out how the results of each operation are divided.
    """
    if module.optimizer_in_backward:
        configured = module.configure_optimizers()
        optimizer: Optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    else:
        optimizer = module.optimizer([torch.nn.Parameter(local_part(p)) for p in parameters])
    for group in optimizer.param_groups if on_cuda else ():
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def step(
    optimizer: Optimizer,
    clip_norm: float | None,
    parameters: list[torch.nn.Parameter],
    tracker: MemoryTracker,
    label: str,
) -> None:
    """Change the weights; what the optimizer keeps is told apart from what it needs meanwhile."""
    phases.enter(phases.STEP)
    parts = [part for group in optimizer.param_groups for part in group["params"]]
    if parts[0] is parameters[0]:  # in the backward pass
        optimizer.step()
    else:
        for part, parameter in zip(parts, parameters, strict=True):
            part.grad = None if parameter.grad is None else local_part(parameter.grad)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parts, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    tracker.label((t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)), label)


def micro_batch(module: SRPOModule, conditions: Conditions, precision: str, kind: type[Draws] = Draws) -> Tensor:
    """The rollout and the loss, whose graph is all that is left of them."""
    draws = kind(module.seed, module.micro_step)
    phases.enter(phases.ROLLOUT)
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        rollout = module.objective.rollout(module.policy, conditions, draws)
        phases.enter(phases.FORWARD)
        return module.objective.loss(module.policy, module.reward, conditions, rollout, draws).loss
