"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from srpo_lightning.module import SRPOModule


class EMA(Callback):
    """Averages the trainable parameters; evaluation shows them, their average, or both.

    Sharded parameters have a sharded average: each rank updates its own part in place.

    Args:
        decay: of the average per optimizer step.
        warmup: average over fewer steps at first: the decay of step n is at most (1 + n) / (10 + n).
        every_n_steps: optimizer steps between updates, which then use the n-th power of the decay.
        dtype: of the average; null is that of the parameters. With a decay of 0.999 bfloat16, which has 8 bits, keeps
            hardly any update: use it to save memory with small decays only.
        device: where the average is kept: on the parameters' device, or in host memory, pinned where that helps.
        evaluate: whose pictures the evaluation shows.
    """

    def __init__(
        self,
        decay: ClosedUnitInterval = 0.999,
        warmup: bool = True,
        every_n_steps: PositiveInt = 1,
        dtype: Literal["float32", "bfloat16"] | None = None,
        device: Literal["same", "host"] = "same",
        evaluate: Literal["both", "ema", "policy"] = "both",
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.dtype = getattr(torch, dtype) if dtype else None
        self.device = device
        self.evaluate = evaluate
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights as they are, unless a checkpoint brought an average."""
        assert isinstance(pl_module, SRPOModule)
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in pl_module.trainable_parameters()}
        self._place(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the average for evaluation, once it differs from the weights."""
        assert isinstance(pl_module, SRPOModule)
        if not self.num_updates or self.evaluate == "policy":
            return
        self._place(pl_module)
        if self.evaluate == "ema":
            pl_module.weight_variants.pop("policy", None)
        pl_module.weight_variants["ema"] = lambda: self._in_place_of(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights."""
        assert isinstance(pl_module, SRPOModule)
        steps = trainer.global_step - self.num_updates
        if steps < self.every_n_steps:
            return  # among them the micro-batches that still accumulate
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        for name, parameter in pl_module.trainable_parameters():
            average = self.average[name]
            average.lerp_(parameter.to(average.device, average.dtype), 1 - decay**steps)

    def state_dict(self) -> dict[str, Any]:
        """How many steps are in the average; itself it is saved beside the weights."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.num_updates = state_dict["num_updates"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average by the names of the parameters, sharded as they are."""
        checkpoint["ema"] = self.average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average back."""
        self.average = checkpoint.get("ema", {})

    def _place(self, module: SRPOModule) -> None:
        for name, parameter in module.trainable_parameters():
            device = parameter.device if self.device == "same" else torch.device("cpu")
            average = self.average[name].to(device, self.dtype or parameter.dtype)
            pins = self.device == "host" and parameter.device.type == "cuda" and not average.is_pinned()
            self.average[name] = average.pin_memory() if pins else average

    @contextmanager
    def _in_place_of(self, module: SRPOModule) -> Iterator[None]:
        waiting = self._swap(module, self.average)
        try:
            yield
        finally:
            self._swap(module, waiting)

    @torch.no_grad()
    def _swap(self, module: SRPOModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put `tensors` in the parameters' place; what was there is returned, in their memory where it fits."""
        waiting = {}
        module.forget_gathered()
        for name, parameter in module.trainable_parameters():
            own, other = parameter.to(tensors[name].device, copy=True), tensors[name]
            parameter.copy_(other)
            waiting[name] = other.copy_(own) if other.dtype == own.dtype else own
        return waiting
