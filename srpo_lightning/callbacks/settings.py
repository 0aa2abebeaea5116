"""A resumed run with another configuration than its checkpoint's: what differs is said, and the new one counts."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from srpo_lightning.callbacks.guard import OverOptimizationGuard, lower
from srpo_lightning.evaluation.exchange import callbacks_that
from srpo_lightning.loggers import keep_id, log_configuration
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.suggestions import moved

Settings: TypeAlias = dict[str, Any]

KEY = "settings"

TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "callbacks")
"""Settings of the trainer that change what is trained or recorded."""

WITHOUT_EFFECT = frozenset({
    "model.policy.init_args.quantize_dir",
    *(f"data.{name}" for name in (
        "cache_dir", "mirror_dir", "mirror_gigabytes", "max_prompts_to_encode", "text_batch_size", "text_device",
        "num_workers", "eval_batch_size", "max_picture_megapixels", "max_picture_megabytes",
    )),
})  # fmt: skip
"""Settings that change where and how fast a run works, but no result."""

FOLLOWED = frozenset({"data.pretrained", "data.height", "data.width"})
"""Settings in checkpoints of earlier versions that followed the policy's: where these differ, it is said of them."""

SINCE = {"trained_guidance": "conditional", "guidance_every": 1, "others": 0}
"""Settings that checkpoints of earlier versions do not have, by their last name, with what held without them."""

CONSEQUENCE = "steps and records before and after do not compare"

IN_PACKAGE = r"^(?:.*[/\\])?srpo_lightning[/\\]assets[/\\]"
"""Where earlier versions wrote paths of what comes with the package, on whatever machine."""

SCHEDULE = r"model\.(optimizer|lr_scheduler)[. ]"
"""Which lines are of the optimizer's or the scheduler's own settings."""


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings that change what is trained or recorded, as plain values by dotted name.

    Args:
        config: Configuration of a command, as nested mappings.
    """
    chosen = {name: config.get(name) for name in ("seed_everything", "model", "data")}
    trainer = dict(config.get("trainer") or {})
    chosen["trainer"] = {name: trainer.get(name) for name in TRAINER}
    # Numbers of a configuration have a type of their own, which torch does not read back.
    plain = json.loads(json.dumps(chosen, default=str))
    callbacks = plain["trainer"].pop("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    plain["callbacks"] = {
        own["class_path"].rpartition(".")[2]: own.get("init_args") or True for own in listed if isinstance(own, dict)
    }
    return {name: value for name, value in _flat("", plain) if name not in WITHOUT_EFFECT}


def everything_of(config: Mapping[str, Any]) -> Settings:
    """A whole configuration as plain values by dotted name.

    Args:
        config: Configuration of a command, as nested mappings.
    """
    return dict(_flat("", json.loads(json.dumps(dict(config), default=str))))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, own in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, own)
    else:
        yield prefix, value


def differences(before: Settings, now: Settings) -> list[str]:
    """A line for each setting whose value is another; what an earlier version only named otherwise is none."""
    lines = []
    for name in [*(name for name in before if name not in FOLLOWED), *(name for name in now if name not in before)]:
        then, present = before.get(name, SINCE.get(name.rpartition(".")[2])), now.get(name)
        if _as_today(then) != _as_today(present):
            lines.append(f"{name} was {then!r} when the checkpoint was written, and is {present!r}")
    return lines


def _as_today(value: Any) -> Any:
    """A value of an earlier version's checkpoint as it is written now: class paths, and what comes with the package."""
    if isinstance(value, list):
        return [_as_today(own) for own in value]
    return moved(value) or re.sub(IN_PACKAGE, "builtin:", value) if isinstance(value, str) else value


class RunSettings(Callback):
    """Keeps the run's settings in its checkpoints and its loggers, and says in which of them a resumed run differs.

    Optimizer and scheduler are made from the present configuration. The learning rate goes on from the step of the
    checkpoint, as if it had been the present one from the start. What OverOptimizationGuard lowered stays lowered, as a
    factor. Where the configuration has not changed, nothing is touched.

    Args:
        settings: Plain values by dotted name, from `settings_of`.
        everything: The whole configuration likewise, from `everything_of`, for loggers.
    """

    def __init__(self, settings: Settings, everything: Settings) -> None:
        self.settings, self.everything = settings, everything
        self._has_another_schedule = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell all loggers the configuration, before Lightning has them write down what the module told: nothing."""
        run, resumed = RunFolder.of(trainer), self.everything.get("ckpt_path")
        for logger in trainer.loggers if stage == TrainerFn.FITTING and trainer.is_global_zero else ():
            keep_id(logger, run.logged_id("mlflow"))
            log_configuration(logger, self.everything, run.config(Path(resumed) if resumed else None).stem)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the run."""
        checkpoint[KEY] = dict(self.settings)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what differs; what a scheduler of another configuration has counted is not read."""
        before = checkpoint.get(KEY)
        if trainer.state.fn != TrainerFn.FITTING or before is None:
            return
        for line in differences(before, self.settings):
            is_schedule = re.match(SCHEDULE, line) is not None
            self._has_another_schedule |= is_schedule
            rank_zero_warn(f"{line}: {'the configuration counts from here on' if is_schedule else CONSEQUENCE}")
        if self._has_another_schedule:
            checkpoint["lr_schedulers"] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the present schedule in place, now that optimizer and scheduler have their states back."""
        assert isinstance(pl_module, SRPOModule)
        if self._has_another_schedule:
            self._has_another_schedule = False
            go_on_as_configured(trainer, pl_module)


def go_on_as_configured(trainer: Trainer, module: SRPOModule) -> None:
    """Put optimizer and scheduler where the present configuration would have them after the steps that were trained."""
    (optimizer,) = trainer.optimizers
    twin = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler = module.lr_scheduler(twin) if module.lr_scheduler is not None else None
    if scheduler is not None:
        for _ in range(trainer.global_step):
            twin.step()  # without gradients: nothing but what warns of the order of calls
            scheduler.step()  # one that waits for a metric was refused
    (group,) = twin.param_groups
    for own in optimizer.param_groups:
        _copy(group, own)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for going_on in schedulers:
        assert scheduler is not None
        going_on.load_state_dict(scheduler.state_dict())
    if (lowered := _lowered(trainer)) != 1:
        lower(trainer.optimizers, schedulers, lowered)


def _copy(settings: Mapping[str, Any], group: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name == "params":
            continue
        if isinstance(group.get(name), Tensor):
            group[name].fill_(value)
        else:
            group[name] = float(value) if isinstance(value, Tensor) else value


def _lowered(trainer: Trainer) -> float:
    guards = callbacks_that(trainer, OverOptimizationGuard)
    return float(torch.tensor([g.learning_rate_factor**g.times_lowered for g in guards], dtype=torch.float64).prod())
