"""When checkpoints are written and which are kept."""

from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.checkpoints import checkpoint_path, checkpoints, remove


class RunCheckpoint(Checkpoint):
    """Writes `<run folder>/checkpoints/step-*.ckpt`: every so many steps, at the end, and when the run is stopped.

    Only whole states are saved: a run interrupted in the middle of a step keeps the checkpoints that it has.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many of the newest stay; older ones are deleted after a newer one is whole.
    """

    def __init__(self, every_n_steps: PositiveInt = 50, keep: PositiveInt = 2) -> None:
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1
        self._between_steps = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has its first step saved already (its number is not restored before this hook)."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on weights, counters and averages disagree."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on every n-th optimizer step, once."""
        self._between_steps = True
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the result."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between steps: at a polite end (SIGTERM), and after skipped steps, which left the last good weights."""
        if trainer.training and self._between_steps:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        path = checkpoint_path(trainer.default_root_dir, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for old in checkpoints(trainer.default_root_dir)[: -self.keep]:
                remove(old)
        rank_zero_info(f"checkpoint: {path}")
