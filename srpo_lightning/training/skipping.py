"""Steps whose loss or gradient is not finite change nothing; a run in which they go on ends."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from srpo_lightning.training.optimizers import InBackward, whole


class SkipNonFinite(Checkpoint):  # Lightning calls these last: RunCheckpoint can save when this ends the run
    """Logs the norm of the gradient, and skips the optimizer step where it is not finite, on all ranks alike.

    SRPOModule adds it to every trainer. Without gradients an optimizer leaves weights and its own state alone.

    Args:
        max_in_a_row: Number of consecutive skipped steps after which the next one ends the run.
        in_backward: What steps in the backward pass, if anything does. Such a step is skipped before its first
            parameter if the loss is not finite, and else for each parameter whose gradient is not finite.
    """

    def __init__(self, max_in_a_row: int, in_backward: InBackward | None = None) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_backward = in_backward
        self.num_in_a_row = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tell what steps in the backward pass whether the loss is finite on every rank."""
        if self.in_backward:
            total = trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum")
            self.in_backward.is_skipping = not total.isfinite()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norm before clipping, and drop gradients that are not finite."""
        if self.in_backward:
            norm = self.in_backward.take_norm()
        else:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(gradients))
        pl_module.log("train/gradient_norm", norm)
        if norm.isfinite():  # the one place in a step where the host waits for the device
            self.num_in_a_row = 0
            return
        self.num_in_a_row += 1
        optimizer.zero_grad(set_to_none=True)
        pl_module.print(
            f"step {trainer.global_step}: the gradient is not finite, step skipped "
            f"({self.num_in_a_row} in a row, the run stops after {self.max_in_a_row})"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a run whose steps keep being skipped."""
        if self.num_in_a_row > self.max_in_a_row:
            raise FloatingPointError(
                f"{self.num_in_a_row} steps in a row had a loss or gradient that is not finite. The weights are those "
                "of the last good step and saved; look at the last samples, then lower the learning rate, or train in "
                "a wider precision (trainer.precision)"
            )
