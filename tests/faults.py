"""What tests put into a run to break it or to listen in; named in configurations by class path."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.rewards import ClipReward

TERMINATE = int(signal.SIGTERM)  # a number, for configurations


class NanReward(ClipReward):
    """Not a number in the training calls that `bad` counts, from 0."""

    def __init__(self, pretrained: str, bad: list[int]) -> None:
        super().__init__(pretrained)
        self.bad, self.num_calls = bad, 0

    def contrast(self, images: Tensor, *args: Any) -> Tensor:
        rewards = super().contrast(images, *args)
        if not images.requires_grad:
            return rewards
        self.num_calls += 1
        return rewards * torch.nan if self.num_calls - 1 in self.bad else rewards


class PromptLog(Callback):
    """A line for each micro-batch: its number and its prompts."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Conditions, batch_idx: int
    ) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps([pl_module.micro_step, batch.prompts]) + "\n")


class History(Callback):
    """Copies of the trained weights after each micro-batch, and the number of optimizer steps then."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.trainable_parameters()})
        self.steps.append(trainer.global_step)


class Terminate(Callback):
    """Sends SIGTERM, or another signal, to one rank's process after so many micro-batches."""

    def __init__(self, after: int, rank: int = 0, number: int = TERMINATE) -> None:
        self.after, self.rank, self.number = after, rank, number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if pl_module.micro_step == self.after and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class Stop(Callback):
    """Raises after the given number of micro-batches of this process."""

    def __init__(self, after: int, error: type[BaseException] = RuntimeError) -> None:
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.after -= 1
        if not self.after:
            raise self.error("stopped by the test")
