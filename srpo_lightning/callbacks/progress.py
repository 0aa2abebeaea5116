"""What runs where, how long it will take, and how far a long step is."""

import time
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.hooks import RemovableHandle

from srpo_lightning.module import SRPOModule
from srpo_lightning.training.context import context_degree, data_rank

TIMED_STEPS = 3
PATIENCE_S = 2.0


class Progress(Callback):
    """Says in one line what runs where, and after three optimizer steps how long they take and when the run will end.

    In a step that takes long, the progress bar counts the calls of the policy (`calls`), at most every two seconds: a
    rollout is many of them.
    """

    def __init__(self) -> None:
        self._begun: tuple[float, int] = (0.0, 0)
        self._calls = 0
        self._shown_s = 0.0
        self._evaluation_s = self._evaluation_start_s = 0.0
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what runs where, and count the calls of the policy."""
        assert isinstance(pl_module, SRPOModule)
        rank_zero_info(describe(trainer, pl_module))
        if trainer.strategy.root_device.type == "cpu" and "bf16" in str(trainer.precision) and lacks_bfloat16():
            rank_zero_info(
                "this processor has no instructions for bfloat16, which it computes several times slower than float32: "
                "set trainer.precision to 32-true, and dtype to float32"
            )
        self._hook = pl_module.policy.register_forward_hook(lambda *_: self._count(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first step, which warms up: the clock starts after it."""
        self._begun = 0.0, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the calls of a step from here."""
        self._calls, self._shown_s = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say once how long steps take."""
        start_s, first = self._begun
        done = trainer.global_step - first
        if not start_s and done == 1:
            self._begun = time.monotonic(), first
        elif start_s and done == TIMED_STEPS:
            seconds = (time.monotonic() - start_s) / (TIMED_STEPS - 1)
            rank_zero_info(f"{seconds:.3g} s per step{self._until(trainer, seconds)}")
            self._begun = 0.0, -1

    def _until(self, trainer: Trainer, seconds: float) -> str:
        """How long the steps that are left will take, with the evaluations between them if one was timed."""
        left = trainer.max_steps - trainer.global_step
        if left <= 0:
            return ""
        between = trainer.val_check_batch
        batches = left * trainer.accumulate_grad_batches
        count = int(batches // between) if self._evaluation_s and between else 0
        time_left = timedelta(seconds=round(seconds * left + self._evaluation_s * count))
        told = f"with {count} evaluations of {self._evaluation_s:.0f} s or more" if count else "without evaluations"
        return f", {time_left} for the {left} left, {told}"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time an evaluation; the first is of one kind of weights, later ones may be of several."""
        self._evaluation_start_s = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep its time."""
        self._evaluation_s = time.monotonic() - self._evaluation_start_s

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no more."""
        if self._hook is not None:
            self._hook.remove()

    def _count(self, trainer: Trainer) -> None:
        self._calls += 1
        bar = trainer.progress_bar_callback
        now_s = time.monotonic()
        if not trainer.training or not isinstance(bar, ProgressBar) or now_s - self._shown_s < PATIENCE_S:
            return
        self._shown_s = now_s
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            metrics = bar.get_metrics(trainer, trainer.lightning_module)
            bar.train_progress_bar.set_postfix(metrics | {"calls": self._calls})


def lacks_bfloat16() -> bool:
    """Whether this processor is one of those without AVX-512, whose products in bfloat16 are emulated."""
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def describe(trainer: Trainer, module: SRPOModule) -> str:
    """One line: devices, strategy, precision, what is trained of what, how many steps of how many samples."""
    trained = sum(p.numel() for _, p in module.trainable_parameters())
    of_policy = sum(p.numel() for p in module.policy.parameters())
    device = trainer.strategy.root_device
    batch_size = getattr(trainer.datamodule, "batch_size", 1)  # type: ignore[attr-defined]
    samples = batch_size * data_rank(trainer).num_ranks * trainer.accumulate_grad_batches
    degree = context_degree(trainer.strategy)
    shared = f", {degree} ranks per sample" if degree > 1 else ""
    steps = trainer.max_steps if trainer.max_steps > 0 else "no limit of"
    return (
        f"{type(module.objective).__name__} on {trainer.world_size} x {device.type} "
        f"({type(trainer.strategy).__name__}, {trainer.precision}{shared}): trains {trained:,} parameters of "
        f"{of_policy:,} in {type(module.policy).__name__}; {steps} steps of {samples} samples; "
        f"{trainer.default_root_dir}"
    )
