"""What runs where, how long it will take, and how far a long step is."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from srpo_lightning import phases
from srpo_lightning.callbacks.step_bar import StepBar
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.context import context_degree, data_rank

TIMED_STEPS = 3
PATIENCE_S = 2.0
EVERY_S = 0.5


class Progress(Callback):
    """Says in one line what runs where, and after three optimizer steps how long they take and when the run will end.

    In a step or an evaluation that takes longer than two seconds, it tells StepBar the phase, and in a phase how many
    calls of the policy have been, of how many in that phase of the last step: a rollout is many of them.
    """

    def __init__(self) -> None:
        self._begun: tuple[float, int] = (0.0, 0)
        self._phase = ""
        self._calls = 0
        self._usual_calls: dict[str, int] = {}
        self._step_start_s = self._told_s = 0.0
        self._evaluation_s = self._evaluation_start_s = 0.0
        self._stops: list[Callable[[], None]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what runs where, and begin to listen."""
        assert isinstance(pl_module, SRPOModule)
        rank_zero_info(describe(trainer, pl_module))
        if trainer.strategy.root_device.type == "cpu" and "bf16" in str(trainer.precision) and lacks_bfloat16():
            rank_zero_info(
                "this processor has no instructions for bfloat16, which it computes several times slower than float32: "
                "set trainer.precision to 32-true, and dtype to float32"
            )
        self._listen(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first step, which warms up: the clock starts after it."""
        self._begun = 0.0, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._step_start_s = time.monotonic()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The phase after the loss."""
        phases.enter(phases.BACKWARD)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The phase after all gradients."""
        phases.enter(phases.STEP)

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
        self._listen(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The phase of an evaluation."""
        self._step_start_s = time.monotonic()
        phases.enter(phases.DRAWING)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep its time."""
        self._evaluation_s = time.monotonic() - self._evaluation_start_s

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in `test` too."""
        self._listen(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in `predict` too."""
        self._listen(trainer, pl_module)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more; Lightning has no teardown then, and what listens keeps the model in memory."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        self._stop()

    def _stop(self) -> None:
        for stop in self._stops:
            stop()
        self._stops = []

    def _listen(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._stops:
            assert isinstance(module, SRPOModule)
            counted = module.policy.register_forward_hook(lambda *_: self._count(trainer))
            self._stops = [counted.remove, phases.listen(lambda phase: self._enter(trainer, phase))]

    def _enter(self, trainer: Trainer, phase: str) -> None:
        self._usual_calls[self._phase] = self._calls
        self._phase, self._calls = phase, 0
        self._tell(trainer)

    def _count(self, trainer: Trainer) -> None:
        self._calls += 1
        if time.monotonic() - self._told_s >= EVERY_S:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        bar, now_s = trainer.progress_bar_callback, time.monotonic()
        if isinstance(bar, StepBar) and now_s - self._step_start_s >= PATIENCE_S:
            self._told_s = now_s
            usual = max(self._usual_calls.get(self._phase, 0), self._calls)
            bar.tell(f"{self._phase} {self._calls}/{usual}" if usual else self._phase)


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
    how = f"{type(trainer.strategy).__name__}, {trainer.precision}{shared}"
    return (
        f"{type(module.objective).__name__} on {trainer.world_size} x {device.type} ({how}): trains {trained:,} "
        f"parameters of {of_policy:,} in {type(module.policy).__name__}; {steps} steps of {samples} samples; "
        f"{trainer.default_root_dir}"
    )
