"""When checkpoints are written and which are kept."""

import math
import signal
import threading
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from srpo_lightning.callbacks.tracking import FILE, read_records
from srpo_lightning.checkpoints import checkpoint_path, checkpoints, newest, remove, step_of


class RunCheckpoint(Checkpoint):
    """Writes `<run folder>/checkpoints/step-*.ckpt`: every so many steps, at the end, and when the run is stopped.

    Only whole states are saved: a run interrupted in the middle of a step keeps the checkpoints that it has. SIGTERM, a
    cluster's preemption, lets all ranks finish the optimizer step, save, and exit with status 143, so that the job can
    be queued again with `--ckpt_path last`.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: how many of the newest stay; older ones are deleted after a newer one is whole.
        monitor: a number that RewardTracking writes, `<weights>/<name>`, for instance ema/judge. Then every evaluated
            step is saved, and the best ones stay too; `--ckpt_path best` is the best.
        mode: whether the largest or the smallest is best.
        keep_best: how many of the best stay.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 50,
        keep: PositiveInt = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        keep_best: PositiveInt = 1,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self._saved_step = -1
        self._between_steps = False
        self._last_step = 0
        self._is_terminated = False
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has its first step saved already (its number is not restored before this hook)."""
        self._saved_step = self._last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # In the place of Lightning's, which talks to the other ranks from within the signal handler.
            self._handler = signal.signal(signal.SIGTERM, self._terminate)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on weights, counters and averages disagree."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on every n-th optimizer step, once."""
        self._between_steps = True
        if trainer.global_step == self._last_step:
            return  # still accumulating
        self._last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if trainer.strategy.reduce_boolean_decision(self._is_terminated, all=False):
            rank_zero_info("SIGTERM: saving and leaving; go on with --ckpt_path last")
            self._save(trainer)
            raise SIGTERMException(128 + signal.SIGTERM)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was just evaluated, if the best are to be kept."""
        if self.monitor and trainer.state.fn == TrainerFn.FITTING and self._between_steps:
            self._save(trainer)
            self._prune(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the result."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between steps: after skipped steps, which left the last good weights."""
        if trainer.training and self._between_steps:
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _terminate(self, *_: Any) -> None:
        self._is_terminated = True

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        path = checkpoint_path(trainer.default_root_dir, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        self._prune(trainer)
        rank_zero_info(f"checkpoint: {path}")

    def _prune(self, trainer: Trainer) -> None:
        folder = trainer.default_root_dir
        if trainer.is_global_zero:
            best = ranked(folder, self.monitor, self.mode)[: self.keep_best] if self.monitor else []
            for old in checkpoints(folder)[: -self.keep]:
                if old not in best:
                    remove(old)


def ranked(run_folder: str | Path, monitor: str, mode: str) -> list[Path]:
    """The checkpoints of a run whose steps were evaluated, best first by `monitor` (see RunCheckpoint)."""
    weights, _, name = monitor.partition("/")
    records = read_records(run_folder) if (Path(run_folder) / FILE).exists() else []
    values = {r["step"]: float(r[name]) for r in records if r["weights"] == weights and name in r}
    scores = {path: values.get(step_of(path), math.nan) for path in checkpoints(run_folder)}
    sign = -1 if mode == "max" else 1
    return sorted((path for path in scores if not math.isnan(scores[path])), key=lambda path: sign * scores[path])


def find_checkpoint(ckpt_path: str, run_folder: str | Path, monitor: str | None, mode: str) -> Path:
    """What `--ckpt_path` means: `last`, `best` (in `monitor`, see RunCheckpoint), or a path.

    Raises:
        ValueError: naming the cure, if there is no such checkpoint.
    """
    if ckpt_path == "last":
        return newest(run_folder)
    if ckpt_path == "best":
        if not monitor:
            raise ValueError("--ckpt_path best needs checkpoint.monitor, the number to be best in: try ema/judge")
        best = ranked(run_folder, monitor, mode)
        if not best:
            raise ValueError(f"--ckpt_path best: no checkpoint in {run_folder} was evaluated in checkpoint.monitor")
        return best[0]
    if not Path(ckpt_path).exists():
        raise ValueError(f"--ckpt_path {ckpt_path} does not exist: `last` takes the newest of {run_folder}")
    return Path(ckpt_path)
