"""Which optimizer goes with which trainer, and stepping it in the backward pass."""

import sys
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from srpo_lightning.errors import naming

PRECISIONS = {torch.float32: ("32-true", "bf16-mixed"), torch.bfloat16: ("bf16-mixed",)}
"""What the trainer may compute in, by the dtype of the trained weights.

The `-true` ones of less than 32 bits would round noise levels and latents with the weights; float16 overflows in FLUX.
"""


LONGEST_TRIAL = 10_000
"""Steps of a schedule that are gone through before anything is read, in some hundredths of a second."""


def new_trial(trainer: Trainer, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> Optimizer:
    """An optimizer of one parameter, made and stepped as Lightning will step the real one.

    Args:
        trainer: Trainer whose max_steps the schedule is tried for.
        optimizer: Setting model.optimizer.
        lr_scheduler: Setting model.lr_scheduler.

    Raises:
        ValueError: naming the setting, if either cannot be made or stepped, or the scheduler waits for a metric.
    """
    with naming("model.optimizer"):
        trial = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
        trial.step()
    with naming("model.lr_scheduler"):
        scheduler = lr_scheduler(trial) if lr_scheduler is not None else None
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler is ReduceLROnPlateau, which waits for a metric, but schedulers step once per "
            "optimizer step: take one that counts steps, for instance torch.optim.lr_scheduler.CosineAnnealingLR, "
            "or OverOptimizationGuard with action lower_learning_rate"
        )
    if scheduler is not None:
        with naming("model.lr_scheduler"):
            for _ in range(max(1, min(trainer.max_steps, LONGEST_TRIAL))):
                trial.step()  # without gradients
                scheduler.step()
    return trial


EIGHT_BIT = {
    "bitsandbytes.optim": ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"),
    "torchao.optim": ("Adam8bit", "AdamW8bit"),
}
"""Adam with states of eight bits, by the module that has the classes."""


def is_eight_bit(optimizer: Any) -> bool:
    """Whether what makes an optimizer is the class of an Adam with states of eight bits.

    Only libraries that are imported already are asked: a class of another one cannot be theirs.
    """
    loaded = ((sys.modules[module], names) for module, names in EIGHT_BIT.items() if module in sys.modules)
    return isinstance(optimizer, type) and issubclass(
        optimizer, tuple(getattr(module, name) for module, names in loaded for name in names)
    )


def check_clipping(clip_norm: float | None, *, in_backward: bool) -> None:
    """Refuse a norm for each parameter's gradient where nothing would clip to it.

    Raises:
        ValueError: naming the settings.
    """
    if clip_norm and not in_backward:
        raise ValueError(
            "model.clip_norm_per_parameter belongs to model.optimizer_in_backward: set that to true, or clip with "
            "trainer.gradient_clip_val"
        )


def check_settings(trainer: Trainer, dtype: torch.dtype, trial: Optimizer, *, in_backward: bool) -> None:
    """Refuse settings of the trainer that do not go together with the policy's or the optimizer's.

    Args:
        trainer: Trainer with its strategy and precision.
        dtype: Dtype of the trained weights.
        trial: Optimizer of the chosen class, of any parameters.
        in_backward: Whether it will step in the backward pass.

    Raises:
        ValueError: naming the setting to change.
    """
    if trainer.precision not in PRECISIONS[dtype]:
        cure = "set trainer.precision to bf16-mixed"
        if dtype == torch.float32:
            cure += " or 32-true; to hold the weights in bfloat16, set model.policy.init_args.dtype to bfloat16"
        else:
            cure += ", or model.policy.init_args.dtype to float32"
        raise ValueError(f"trainer.precision {trainer.precision} cannot train weights in {str(dtype)[6:]}: {cure}")
    is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    package = type(trial).__module__.split(".")[0]
    if is_sharded and (package == "bitsandbytes" or (package == "torchao" and dtype == torch.bfloat16)):
        raise ValueError(
            f"{type(trial).__name__} of {package} cannot step {str(dtype)[6:]} parameters that are divided over ranks: "
            "set model.optimizer.class_path to srpo_lightning.training.low_bit.AdamW8bit, or trainer.strategy to ddp"
        )
    if in_backward:
        _check_in_backward(trainer)


def _check_in_backward(trainer: Trainer) -> None:
    refusals = {
        "the whole gradient, which clipping measures, is never there: set trainer.gradient_clip_val to 0; "
        "model.clip_norm_per_parameter clips each parameter on its own": bool(trainer.gradient_clip_val),
        "gradients are used up as they come: set trainer.accumulate_grad_batches to 1 and raise data.batch_size, or "
        "train on more devices": trainer.accumulate_grad_batches != 1,
        f"{type(trainer.strategy).__name__} averages gradients too late for it: train on one device, or set "
        "trainer.strategy to srpo_lightning.training.strategies.ShardedStrategy": not isinstance(
            trainer.strategy, SingleDeviceStrategy | ModelParallelStrategy
        ),
    }
    for refusal, holds in refusals.items():
        if holds:
            raise ValueError(f"model.optimizer_in_backward: {refusal}; or set it to false")


class InBackward:
    """Steps each parameter as soon as its gradient is accumulated, then frees the gradient.

    The optimizer is called with one gradient at a time and passes over parameters without one. Weights, optimizer
    states, checkpoints and schedules are those of a step after the backward pass; only stochastic rounding draws in
    another order. A parameter whose gradient is not finite is left alone, and so is its state.

    Args:
        clip_norm: Norm that each parameter's gradient is clipped to on its own; None clips none.
    """

    def __init__(self, clip_norm: float | None = None) -> None:
        self.clip_norm = clip_norm
        self.norms: list[Tensor] = []
        self.is_skipping = False
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Step with an optimizer from now on, and no more with one before."""
        for handle in self._handles:
            handle.remove()
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        self._handles = [p.register_post_accumulate_grad_hook(partial(self._step, optimizer)) for p in parameters]

    def take_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping, once per step; NaN where the step was skipped."""
        norms, self.norms = self.norms, []
        return torch.stack(norms).norm() if norms else torch.tensor(torch.nan)

    @torch.no_grad()
    def _step(self, optimizer: Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if not self.is_skipping:
            norm = whole(torch.linalg.vector_norm(parameter.grad))
            self.norms.append(norm)
            if norm.isfinite():
                if self.clip_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameter, self.clip_norm, norm)
                optimizer.step()
        parameter.grad = None


def whole(tensor: Tensor) -> Tensor:
    """The same tensor on every rank, also where it was computed from parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
