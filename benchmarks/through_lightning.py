"""What Lightning adds to a training step: steps through Trainer.fit and bare ones take turns."""

import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from benchmarks.bare_step import BareStep, fresh, synchronize
from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import EMA
from srpo_lightning.config.classes import of_class
from srpo_lightning.files.quiet import quiet_first
from srpo_lightning.module import SRPOModule


class Spent(NamedTuple):
    """Seconds by the clock, and of processors; other programs on the machine change the second less."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: "Spent") -> "Spent":
        """From then to now; since nothing, where the clocks stand."""
        return cls(time.perf_counter() - start.wall, time.process_time() - start.cpu)


NOTHING = Spent(0, 0)


class TakingTurns(Dataset[Conditions]):
    """Batches for Lightning, a bare step being made before each is handed out; both kinds of step are timed.

    Lightning's lasts from one batch to its asking for the next: loop, hooks, callbacks, logging and loading are in it.
    """

    def __init__(self, conditions: Conditions, num_steps: int) -> None:
        self.conditions = conditions
        self.num_steps = num_steps
        self.make_bare_step: Callable[[], None] = lambda: None
        self.bare: list[Spent] = []
        self.lightning: list[Spent] = []
        self._handed_over = NOTHING

    def __len__(self) -> int:
        return self.num_steps + 1

    def __getitem__(self, index: int) -> Conditions:
        synchronize(self.conditions.device)
        if index:
            self.lightning.append(Spent.since(self._handed_over))
        start = Spent.since(NOTHING)
        self.make_bare_step()
        synchronize(self.conditions.device)
        self.bare.append(Spent.since(start))
        self._handed_over = Spent.since(NOTHING)
        return fresh(self.conditions, -index)


def lightning_share(module: SRPOModule, config: Namespace, conditions: Conditions, num_steps: int) -> list[Spent]:
    """What a step through Trainer.fit takes over what a bare one does, pair by pair."""
    turns = TakingTurns(conditions, num_steps)
    emas = [EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)]
    quiet_first()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator=conditions.device.type,
            devices=1,
            max_steps=num_steps + 1,
            precision=config.trainer.precision,
            gradient_clip_val=config.trainer.gradient_clip_val,
            log_every_n_steps=config.trainer.log_every_n_steps,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[*emas, TQDMProgressBar(refresh_rate=10)],
        )

        def first_bare_step() -> None:
            turns.make_bare_step = BareStep(module, config, conditions, trainer.optimizers[0])
            turns.make_bare_step()

        turns.make_bare_step = first_bare_step
        trainer.fit(module, DataLoader(turns, batch_size=None, shuffle=False))
    pairs = zip(turns.lightning[1:], turns.bare[1:], strict=False)
    return [Spent(ours.wall / bare.wall, ours.cpu / bare.cpu) for ours, bare in pairs]
