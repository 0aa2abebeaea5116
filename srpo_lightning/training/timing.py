"""Times of what a device does, taken without making the host wait for it."""

import time
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

Moment: TypeAlias = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """The moment when the device will have done all that it was given so far; on a CPU that is now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """The seconds from one moment of a device to a later one, for which this waits."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float), "both moments are of one device"
        assert isinstance(end, float), "both moments are of one device"
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


class StepTimes(Callback):
    """Logs how long the rollouts and the updates of a step took, over its micro-batches, where the step is logged.

    SRPOModule adds it to every trainer, and tells it when a rollout and an update have ended. What callbacks do after
    an update, as saving and evaluating, is no part of it.
    """

    def __init__(self) -> None:
        self._moments: list[list[Moment]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a micro-batch."""
        self._moments.append([now(pl_module.device)])

    def end_rollout(self, device: torch.device) -> None:
        """Note that the rollout of the micro-batch has ended; what follows is its update."""
        self._moments[-1].append(now(device))

    def end_update(self, device: torch.device) -> None:
        """Note that the optimizer has stepped."""
        self._moments[-1].append(now(device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after the last micro-batch of a step."""
        if len(self._moments[-1]) == 2:  # still accumulating
            self.end_update(pl_module.device)
            return
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if every and trainer.global_step % every == 0:
            # To read the moments is to wait for the device, as the logger is about to.
            for number, part in enumerate(("rollout", "update")):
                seconds = sum(seconds_between(*moments[number : number + 2]) for moments in self._moments)
                pl_module.log(f"train/seconds_{part}", seconds)
        self._moments = []
