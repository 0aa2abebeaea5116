"""Ranks that see another checkpoint, other records, other settings or other weights end before they train together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed, nn

from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.data import PromptData
from srpo_lightning.evaluation.exchange import callbacks_that
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.agreement import Fact, check_agreement, digest, identity_of_checkpoint, weights_of

SAME_FILES = "every rank must read the same files"
SAME_SETTINGS = "start every rank with the same configuration and command line"


class Agreement(Callback):
    """Compares what the ranks have found, as soon as they are connected and before anything large is read.

    SRPOModule compares weights after it has read them, and this callback once more after a checkpoint. The weights of
    judges and metrics are compared before the first evaluation.

    Args:
        settings: Settings of the run, by dotted name.
        ckpt_path: Path of the checkpoint that this process found.
        refusal: Reason why this process found none; raised if no other rank has found one either.
    """

    def __init__(self, settings: Mapping[str, Any], ckpt_path: str | None = None, refusal: str | None = None) -> None:
        self.settings = settings
        self.ckpt_path = ckpt_path
        self.refusal = refusal
        self._has_compared_judges = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare what was found: the ranks are connected, and nothing is read."""
        if trainer.world_size > 1 and distributed.is_initialized():
            check_agreement(self.facts(trainer.datamodule))  # type: ignore[attr-defined]
        if self.refusal:
            raise ValueError(self.refusal)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare what was read from a checkpoint."""
        assert isinstance(pl_module, SRPOModule)
        pl_module.compare_weights()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare judges and metrics, which no strategy makes the same: they are no part of the module."""
        if not self._has_compared_judges and distributed.is_available() and distributed.is_initialized():
            self._has_compared_judges = True
            models: dict[str, nn.Module] = {}
            for tracking in callbacks_that(trainer, RewardTracking):
                models |= {f"weights of {type(tracking).__name__}, model {i}": m for i, m in enumerate(tracking.models)}
            check_agreement(weights_of({name: [*m.parameters(), *m.buffers()] for name, m in models.items()}, 0))

    on_test_start = on_validation_start

    def facts(self, data: Any) -> dict[str, Fact]:
        """What this rank has found, by what it is."""
        found = self.refusal or "none"
        identity = found
        if self.ckpt_path:
            path = Path(self.ckpt_path)
            identity = path.name + identity_of_checkpoint(path)
            found = f"{path.name} with a sum of {digest([identity])[:8]}"
        cure = "every rank must see the same run folder with the same files: look where trainer.default_root_dir is"
        facts = {"checkpoint to go on from": Fact(identity, found, cure)}
        if isinstance(data, PromptData):
            for name, (value, told) in data.described.items():
                told = f"{told} with a sum of {digest([value])[:8]}"
                facts[name] = Fact(value, told, f"{SAME_FILES} under data.train, data.evaluation and data.images")
        facts |= {name: Fact(repr(value), repr(value), SAME_SETTINGS) for name, value in self.settings.items()}
        return facts
