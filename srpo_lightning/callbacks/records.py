"""What all callbacks that append to a file of the run folder have in common."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from srpo_lightning.files.records import drop_after
from srpo_lightning.run_folder import RunFolder

EVALUATION_DUE = "evaluation_due"
"""The key of a checkpoint whose step is yet to be evaluated: records of that step are dropped when a run resumes."""


class Recorder(Callback, ABC):
    """A callback that appends records to a file of the run folder.

    A new run begins the file anew. A resumed run keeps the records up to its checkpoint: what a killed run wrote after
    that would stand there twice.
    """

    @staticmethod
    @abstractmethod
    def file(run: RunFolder) -> Path:
        """The file that this callback appends to."""

    _has_begun = False
    _is_evaluation_due = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the records of the checkpoint's step are still to come."""
        self._is_evaluation_due = checkpoint.get(EVALUATION_DUE, False)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin before the evaluation of the base, which is the first record of a new run."""
        self._begin(trainer, -1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin here where the base is not evaluated, as in a resumed run."""
        if not self._has_begun:
            self._begin(trainer, trainer.global_step - self._is_evaluation_due if trainer.ckpt_path else -1)

    def _begin(self, trainer: Trainer, step: int) -> None:
        self._has_begun = True
        path = self.file(RunFolder.of(trainer))
        if trainer.is_global_zero and path.is_file():
            drop_after(path, step)
        trainer.strategy.barrier()
