"""The ema: an exponential moving average of the policy's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from srpo_lightning import phases
from srpo_lightning.evaluation.exchange import OffersWeights, Weights
from srpo_lightning.module import SRPOModule


class EMA(Callback, OffersWeights):
    """Averages the trainable parameters; evaluation shows the policy, its ema, or both.

    The ema of sharded parameters is sharded: each rank updates its own part in place.

    Args:
        decay: Decay of the ema per optimizer step.
        warmup: Whether the ema is over fewer steps at first: the decay of step n is at most (1 + n) / (10 + n).
        every_n_steps: Optimizer steps between updates, which then use the n-th power of the decay.
        dtype: Type of the ema's numbers; null is that of the parameters. With a decay of 0.999 bfloat16, which has 8
            bits, keeps hardly any update: use it to save memory with small decays only.
        device: Place of the ema: the parameters' device, or host memory, pinned where that helps.
        evaluate: Weights whose pictures the evaluation shows.
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
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the policy as it is, unless a checkpoint brought an ema."""
        assert isinstance(pl_module, SRPOModule)
        if not self.weights:
            self.weights = {name: p.detach().clone() for name, p in pl_module.trainable_parameters()}
        self._place(pl_module)

    on_train_start = on_fit_start  # ShardedStrategy reads a checkpoint in between

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the ema where it is to be, also where it comes from a checkpoint."""
        assert isinstance(pl_module, SRPOModule)
        if self.offered_weights(pl_module):
            self._place(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def offered_weights(self, module: LightningModule) -> dict[str, Weights | None]:
        """The ema, once it differs from the policy."""
        assert isinstance(module, SRPOModule)
        if not self.num_updates or self.evaluate == "policy":
            return {}
        hidden: dict[str, Weights | None] = {"policy": None} if self.evaluate == "ema" else {}
        return {"ema": partial(self._in_place_of, module), **hidden}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the policy."""
        assert isinstance(pl_module, SRPOModule)
        steps = trainer.global_step - self.num_updates
        if steps < self.every_n_steps:
            return  # among them the micro-batches that still accumulate
        phases.enter(phases.AVERAGING)
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        for name, parameter in pl_module.trainable_parameters():
            ema = self.weights[name]
            ema.lerp_(parameter.to(ema.device, ema.dtype), 1 - decay**steps)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps in the ema, which itself is saved beside the policy."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.num_updates = state_dict["num_updates"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the ema by the names of the parameters, sharded as they are."""
        checkpoint["ema"] = self.weights

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the ema back."""
        self.weights = checkpoint.get("ema", {})

    @torch.inference_mode(False)  # which an evaluation may run in, and whose tensors no step could change
    def _place(self, module: SRPOModule) -> None:
        for name, parameter in module.trainable_parameters():
            device = parameter.device if self.device == "same" else torch.device("cpu")
            ema = self.weights[name].to(device, self.dtype or parameter.dtype)
            pins = self.device == "host" and parameter.device.type == "cuda" and not ema.is_pinned()
            self.weights[name] = ema.pin_memory() if pins else ema

    @contextmanager
    def _in_place_of(self, module: SRPOModule) -> Iterator[None]:
        waiting = self._swap(module, self.weights)
        try:
            yield
        finally:
            self._swap(module, waiting)

    @torch.no_grad()
    def _swap(self, module: SRPOModule, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put `tensors` in the parameters' place; return what was there, in the memory of `tensors` where it fits."""
        waiting = {}
        module.forget_gathered()
        for name, parameter in module.trainable_parameters():
            own, other = parameter.to(tensors[name].device, copy=True), tensors[name]
            parameter.copy_(other)
            waiting[name] = other.copy_(own) if other.dtype == own.dtype else own
        return waiting
