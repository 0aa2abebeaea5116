"""When checkpoints are written and which are kept."""

import signal
import time
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from srpo_lightning.callbacks.records import EVALUATION_DUE
from srpo_lightning.callbacks.stop_signals import StopSignals
from srpo_lightning.files.checkpoints import remove
from srpo_lightning.files.full_disk import FullDiskError
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.context import data_rank


class RunCheckpoint(Checkpoint):
    """Writes `<run folder>/checkpoints/step-*.ckpt`: every so many steps, at the end, and when the run is stopped.

    A step that is also evaluated is saved after its evaluation. A run that ends before an evaluation that was due
    begins with it when resumed. Only whole states are saved: a run interrupted within a micro-batch keeps the
    checkpoints that it has, and one interrupted between the micro-batches of a step saves the state before that step.

    SIGTERM, a cluster's preemption, and Ctrl-C let all ranks finish the optimizer step, or the batch of an evaluation.
    They save and exit with status 143 and 130, to go on with `--ckpt_path last`. A second Ctrl-C ends the process at
    once. A checkpoint that finds no room on the disk is left out, and training goes on; the last one ends the run.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        every_n_minutes: Minutes since the last checkpoint, or the start, after which the next optimizer step is saved
            too; null: by steps only.
        keep: Number of newest checkpoints that stay; older ones are deleted after a newer one is whole.
        monitor: Number that RewardTracking writes, `<weights>/<name>`, for instance ema/judge. With it every evaluated
            step is saved, and the best ones stay too; `--ckpt_path best` is the best.
        mode: Direction of the number: whether the largest or the smallest is best.
        keep_best: Number of best checkpoints that stay.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 50,
        keep: PositiveInt = 2,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        keep_best: PositiveInt = 1,
        every_n_minutes: PositiveFloat | None = None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self.every_n_minutes = every_n_minutes
        self._saved_step = -1
        self._saved_at_s = 0.0
        self._position: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._between_steps = False
        self._is_save_due = self._is_evaluation_due = False
        self._last_step = 0
        self._signals = StopSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first step of a resumed run for saved; its number is not restored before this hook."""
        own = RunFolder.of(trainer).checkpoint(trainer.global_step)
        self._last_step = trainer.global_step
        self._saved_step = trainer.global_step if goes_on_from(trainer.ckpt_path, own) else -1
        self._saved_at_s = time.monotonic()
        self._signals = StopSignals()
        self._signals.install(trainer.world_size == 1, trainer.is_global_zero)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._set_later_aside(trainer)
        if self._is_evaluation_due and trainer.enable_validation:
            self._between_steps = True
            evaluate(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save nothing from here on: policy, counters and ema disagree."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on every n-th optimizer step and every so many minutes, once, unless an evaluation comes first."""
        assert isinstance(pl_module, SRPOModule)
        self._between_steps = True
        if trainer.global_step == self._last_step:
            return  # still accumulating
        self._last_step = trainer.global_step
        self._position = pl_module.micro_step, data_state(trainer), deepcopy(trainer.fit_loop.state_dict())
        self._is_save_due = trainer.global_step % self.every_n_steps == 0 or self._is_time(trainer)
        self._is_evaluation_due = is_evaluation_due(trainer)
        if self._is_save_due and not self._is_evaluation_due:
            self._save(trainer, can_wait=True)
        self._leave_if_asked(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether this is the evaluation of a step, which stays due until it ends."""
        assert isinstance(pl_module, SRPOModule)
        self._is_evaluation_due = self._between_steps and not pl_module.num_accumulated

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave between batches where asked: a cluster's patience may not last for all of an evaluation."""
        if self._is_evaluation_due:
            self._leave_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was just evaluated, if it is time or the best are to be kept."""
        was_due, self._is_evaluation_due = self._is_evaluation_due, False
        if was_due:
            if self._saved_step == trainer.global_step:  # an evaluation that a clock asked for a moment later
                self._saved_step, self._is_save_due = -1, True
            if self.monitor or self._is_save_due:
                self._save(trainer, can_wait=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the result; where a run was stopped between the micro-batches of a step, the state before that step."""
        assert isinstance(pl_module, SRPOModule)
        if pl_module.num_accumulated:  # trainer.max_time may end it anywhere
            self._save_last_step(trainer, pl_module)
        else:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between steps: after skipped steps, which left the last good weights, or in an evaluation.

        Of several ranks all write together. So they do after skipped steps, which all have; what else ends one of them
        leaves it alone, and waiting for the others would hide its error.
        """
        is_between = self._between_steps and (trainer.training or self._is_evaluation_due)
        is_of_all = trainer.world_size == 1 or isinstance(exception, FloatingPointError)
        if not is_between or not is_of_all or isinstance(exception, FullDiskError):
            return
        try:
            self._save_last_step(trainer, pl_module)
        except FullDiskError as error:
            rank_zero_warn(f"what was trained since the last checkpoint is lost: {error}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete what a run still holds that was killed in its last save, and resumed with no step left."""
        self._prune(trainer)
        if self._is_evaluation_due and trainer.enable_validation:
            rank_zero_warn(
                f"the evaluation of step {trainer.global_step} did not end before the run did, and there is no step "
                "left to train: run `validate` for its numbers, or raise trainer.max_steps"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how many samples there are in a step, and whether the step is yet to be evaluated."""
        checkpoint["step_size"] = step_size(trainer)
        checkpoint[EVALUATION_DUE] = self._is_evaluation_due

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say loudly that a resumed run will not be the unbroken one."""
        self._is_evaluation_due = checkpoint.get(EVALUATION_DUE, False)
        before, now = checkpoint.get("step_size"), step_size(trainer)
        if trainer.state.fn != TrainerFn.FITTING or not before or not now:
            return
        if (before[0] * before[1], before[2]) != (now[0] * now[1], now[2]):
            written, going_on = (f"{r} x {b} x {a} = {r * b * a}" for r, b, a in (before, now))
            rank_zero_warn(
                f"samples per step, ranks x data.batch_size x accumulate_grad_batches, were {written} when the "
                f"checkpoint was written, and are {going_on}: the run will not be the unbroken one, though no prompt "
                "comes twice in a pass or is left out; where accumulate_grad_batches is another, the first step may "
                f"have fewer micro-batches. To go on exactly keep ranks x batch_size at {before[0] * before[1]} and "
                f"accumulate_grad_batches at {before[2]}"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._signals.restore()

    def _leave_if_asked(self, trainer: Trainer, module: LightningModule) -> None:
        if self._is_evaluation_due and trainer.global_step == trainer.max_steps:
            return  # the little that is left comes first: a resumed run would have no step to do it after
        wish, of_any = self._signals.wish, trainer.strategy.reduce_boolean_decision
        if not of_any(wish is not None, all=False):
            return
        wish = signal.SIGINT if of_any(wish == signal.SIGINT, all=False) else signal.SIGTERM
        self._save_last_step(trainer, module)
        rank_zero_info(f"{wish.name}: step {trainer.global_step} is saved; go on with --ckpt_path last")
        raise SystemExit(128 + wish)

    def _save_last_step(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, SRPOModule)
        if self._position is None:  # no step of this process has ended
            if not module.num_accumulated:
                self._save(trainer)
            return
        # What was accumulated since the last step is lost: let the run go on from before it.
        micro_step, data, loops = self._position
        module.rewind(micro_step)
        if data:
            trainer.datamodule.load_state_dict(data)  # type: ignore[attr-defined]
        trainer.fit_loop.load_state_dict(loops)
        self._save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_minutes is None:
            return False
        is_late = time.monotonic() - self._saved_at_s >= 60 * self.every_n_minutes
        return trainer.strategy.reduce_boolean_decision(is_late, all=False)  # the ranks' clocks differ

    def _save(self, trainer: Trainer, can_wait: bool = False) -> None:
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step
        path = RunFolder.of(trainer).checkpoint(trainer.global_step)
        self._saved_at_s = time.monotonic()
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except FullDiskError as error:
            self._saved_step = -1
            if not can_wait:
                raise
            rank_zero_warn(f"training goes on without a checkpoint of step {trainer.global_step}: {error}")
            return
        self._prune(trainer)
        rank_zero_info(f"checkpoint: {path}")
        self._saved_at_s = time.monotonic()

    def _set_later_aside(self, trainer: Trainer) -> None:
        """Make room for the steps of a run that goes on from another than its newest checkpoint."""
        run, step = RunFolder.of(trainer), trainer.global_step
        later = run.later_than(step if self._saved_step == step else step - 1)
        if later:
            folder = run.set_aside(later)
            rank_zero_info(
                f"the run goes on from step {step}: what it wrote after that "
                f"({', '.join(own.name for own in later)}) is in {folder} now, and may be deleted"
            )

    def _prune(self, trainer: Trainer) -> None:
        run = RunFolder.of(trainer)
        if trainer.is_global_zero:
            best = run.ranked_checkpoints(self.monitor, self.mode)[: self.keep_best] if self.monitor else []
            for old in run.checkpoints()[: -self.keep]:
                if old not in best:
                    remove(old)


def goes_on_from(ckpt_path: str | Path | None, own: Path) -> bool:
    """Whether a run goes on from its own checkpoint, or begins."""
    return ckpt_path is None or Path(ckpt_path).resolve() == own.resolve()


def is_evaluation_due(trainer: Trainer) -> bool:
    """Whether Lightning evaluates after the batch that has just ended."""
    loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    return loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def evaluate(trainer: Trainer) -> None:
    """Run the evaluation that a resumed run's last step did not live to see, as Lightning does in an epoch."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def data_state(trainer: Trainer) -> dict[str, Any]:
    """Where the stream of training samples stands; empty where there is no data module."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return dict(data.state_dict()) if data else {}


def step_size(trainer: Trainer) -> list[int] | None:
    """Ranks with samples of their own, samples of each per micro-batch, and micro-batches per step.

    None where the data does not tell.
    """
    batch_size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
    # Numbers of a configuration have a type of their own, which torch does not read back.
    num_ranks = data_rank(trainer).num_ranks
    return [num_ranks, int(batch_size), int(trainer.accumulate_grad_batches)] if batch_size else None
