"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from srpo_lightning.module import SRPOModule


class EMA(Callback):
    """Averages the trainable parameters after each optimizer step; evaluation shows both them and their average.

    Args:
        decay: of the average per optimizer step.
        warmup: average over fewer steps at first: the decay of step n is at most (1 + n) / (10 + n).
    """

    def __init__(self, decay: ClosedUnitInterval = 0.999, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
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
        if self.num_updates:
            self._place(pl_module)
            pl_module.weight_variants["ema"] = lambda: self._in_place_of(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights, once per optimizer step."""
        assert isinstance(pl_module, SRPOModule)
        if trainer.global_step <= self.num_updates:
            return  # still accumulating
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        parameters = dict(pl_module.trainable_parameters())
        with torch.no_grad():
            torch._foreach_lerp_([self.average[name] for name in parameters], list(parameters.values()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps are in it."""
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.num_updates, self.average = state_dict["num_updates"], state_dict["average"]

    def _place(self, module: SRPOModule) -> None:
        parameters = dict(module.trainable_parameters())
        self.average = {name: average.to(parameters[name]) for name, average in self.average.items()}

    @contextmanager
    def _in_place_of(self, module: SRPOModule) -> Iterator[None]:
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: SRPOModule) -> None:
        for name, parameter in module.trainable_parameters():
            raw = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(raw)
