"""fit, validate, test and predict: LightningCLI with one module, one data module and one fixed run folder."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.callbacks.agreement import Agreement
from srpo_lightning.callbacks.predictions import Predictions
from srpo_lightning.callbacks.progress import Progress
from srpo_lightning.callbacks.settings import RunSettings, everything_of, settings_of
from srpo_lightning.callbacks.step_bar import StepBar
from srpo_lightning.config.arguments import Parser, add_project_arguments, choose_strategy, read_config
from srpo_lightning.config.effects import check_effects, check_single
from srpo_lightning.config.loggers import forget_own, go_on_in_the_same
from srpo_lightning.config.loops import check_loops
from srpo_lightning.config.shipped import by_name, recipe_name
from srpo_lightning.data import PromptData
from srpo_lightning.errors import naming
from srpo_lightning.files.checkpoints import AtomicCheckpointIO, check_whole, complete_or_absent
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder

FEW_PROCESSES = 8
"""As many ranks may try a run on a CPU, however few cores it has."""


def run_trainer(args: ArgsType, command: str) -> None:
    """Run a command.

    Args:
        args: Command line; with None Lightning reads the process's, and does not warn that there are two.
        command: Name of the command: fit, validate, test or predict.
    """
    SRPOCLI(
        SRPOModule,
        PromptData,
        args=args,
        command=command,
        seed_everything_default=0,
        parser_class=Parser,
        save_config_callback=SaveConfigInRunFolder,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # nothing reads settings from a checkpoint
    )


class SRPOCLI(LightningCLI):
    """LightningCLI plus: links, the run folder, and what `last` means.

    Args:
        command: Name of the command: fit, validate, test or predict.
    """

    def __init__(self, *args: Any, command: str, **kwargs: Any) -> None:
        self.command = command
        with ExitStack() as self.held:  # until the command has run, which the constructor does
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is said once counts everywhere."""
        add_project_arguments(parser)
        if self.command == "predict":
            parser.add_class_arguments(Predictions, as_group=False)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method, called on the object
        """The command that is asked for alone: the settings of each take long to collect."""
        return {self.command: super().subcommands()[self.command]}

    def setup_parser(self, *args: Any) -> None:
        """No code is read from a checkpoint, and predictions are files, not a list that grows."""
        super().setup_parser(*args)
        self.parser.set_defaults({f"{self.command}.weights_only": True})
        if self.command == "predict":
            self.parser.set_defaults({"predict.return_predictions": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take whole numbers as a seed, which every random number follows from."""
        super().parse_arguments(parser, args)
        seed = self.config[self.command].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 1 << 32:
            raise ValueError(
                f"seed_everything is {str(seed).lower()}: every random number follows from it, give a whole number "
                f"from 0 to {(1 << 32) - 1}"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log into the run folder, in one place however often the run is resumed; what is no part of it apart."""
        config, built = self.config[self.command], self.config_init[self.command]
        if config.trainer.logger in (None, True):
            run = RunFolder(config.trainer.default_root_dir)
            logs = (run if self.command == "fit" else run.validation).logs
            kwargs["logger"] = TensorBoardLogger(logs.parent, name=logs.name, version="", default_hp_metric=False)
        chosen = built.trainer.callbacks
        chosen = [own for own in (chosen if isinstance(chosen, list) else [chosen]) if own]
        check_single([*chosen, built.checkpoint])
        has_choice = config.trainer.enable_progress_bar is False or any(isinstance(c, ProgressBar) for c in chosen)
        progress = [] if has_choice else [StepBar()]
        if config.trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # Progress says what is trained, in one line
        predictions = [Predictions(config.output)] if self.command == "predict" else []
        files = [recipe_name(str(file)) for file in config.get("config") or ()]
        named = by_name(config.as_dict() | {"config": files})
        settings = settings_of(named)
        told = RunSettings(settings, everything_of(named))
        self.trainer_defaults["callbacks"] = [*progress, told, *predictions, Progress()]
        # Agreement comes before any that reads weights.
        kwargs["callbacks"] = [Agreement(settings, config.ckpt_path, self.refusal), *chosen]
        kwargs["plugins"] = with_atomic_checkpoints(built.trainer.get("plugins"))
        with naming():
            return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Read no settings from a checkpoint, since the configuration holds all; Lightning has no switch for it."""

    refusal: str | None = None
    """Why this rank found no checkpoint, until the other ranks know."""

    def before_instantiate_classes(self) -> None:
        """Settle how devices are used and what to resume before anything is read."""
        config = self.config[self.command]
        for name in ("trainer", "model", "data", "checkpoint"):
            if not isinstance(config[name], Namespace):
                raise ValueError(f"{name}: expected its settings, found {config[name] or 'null'}")
        if not config.trainer.default_root_dir:
            raise ValueError("trainer.default_root_dir is empty: give the folder of the run, for instance runs/first")
        check_loops(config.trainer, self.command)
        chosen = choose_strategy(config, devices_here(config.trainer))
        if chosen:
            rank_zero_info(chosen)
        if self.command == "fit" and is_first_rank() and not config.trainer.fast_dev_run:
            self.held.enter_context(RunFolder(config.trainer.default_root_dir).lock())
        try:
            self._find_checkpoint(config)
        except ValueError as error:
            if not others_have_started():
                raise
            self.refusal, config.ckpt_path = str(error), None
        run = RunFolder(config.trainer.default_root_dir)
        if config.trainer.fast_dev_run:  # which logs nowhere
            config.trainer.default_root_dir = str(run.trial.path)
        elif self.command == "fit" and is_first_rank():
            go_on_in_the_same(config.trainer.logger, run, is_resumed=config.ckpt_path is not None)

    def _find_checkpoint(self, config: Namespace) -> None:
        run = RunFolder(config.trainer.default_root_dir)
        if config.ckpt_path is not None:
            found = run.find_checkpoint(config.ckpt_path, config.checkpoint.monitor, config.checkpoint.mode)
            rank_zero_info(f"--ckpt_path {config.ckpt_path}: {found}")
            check_whole(found, content=is_first_rank())
            config.ckpt_path = str(found)
        elif self.command == "fit" and run.checkpoints() and not config.trainer.fast_dev_run:
            raise ValueError(
                f"{config.trainer.default_root_dir} holds a run already: resume it with --ckpt_path last, name another "
                "folder with --trainer.default_root_dir, or delete it"
            )

    def after_instantiate_classes(self) -> None:
        """Everything knows its settings; nothing is read but then the prompts."""
        check_effects(self.command, self.trainer, self.model, self.datamodule)
        self.datamodule.read(trains=self.command == "fit")

    def before_fit(self) -> None:
        """Refuse what cannot fit, once per node, while nothing of the models but their shapes is known."""
        if self.config.fit.memory_check and self.trainer.local_rank == 0:
            from srpo_lightning.jobs.estimate.room import check_room  # takes more imports than other commands need

            check_room(self.config.fit, self.trainer)


class SaveConfigInRunFolder(SaveConfigCallback):
    """Writes config.yaml into the run folder, and config-step-*.yaml when the run is resumed.

    Beside it lies recipe.json: the configuration files that were named, and all settings as they alone would have them.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the record of every start."""
        if stage != "fit":
            return
        path = RunFolder.of(trainer).config(Path(self.config.ckpt_path) if self.config.ckpt_path else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming("this configuration cannot be written down"), complete_or_absent(path) as partial:
            config = self.config.clone()
            forget_own(config.trainer.logger, RunFolder.of(trainer))
            self.parser.save(config, str(partial), skip_none=False, overwrite=True, multifile=False)
        recipe = recipe_of([str(file) for file in self.config.get("config") or ()])
        with complete_or_absent(RunFolder.of(trainer).recipe) as partial:
            partial.write_text(json.dumps(recipe, default=str), encoding="utf-8")


def recipe_of(files: list[str]) -> dict[str, Any]:
    """Configuration files, and all settings as they alone would have them; null where they alone are no whole one."""
    try:
        settings = by_name(read_config(*files).as_dict()) if files else None
    except ValueError:
        settings = None
    return {"files": [recipe_name(file) for file in files], "settings": settings}


def with_atomic_checkpoints(plugins: Any) -> list[Any]:
    """The trainer's plugins, and what writes checkpoints whole or not at all.

    Raises:
        ValueError: if one of them writes checkpoints in another way.
    """
    chosen = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    for plugin in chosen:
        if isinstance(plugin, CheckpointIO) and not isinstance(plugin, AtomicCheckpointIO):
            raise ValueError(
                f"trainer.plugins has {type(plugin).__name__}, which would write checkpoints that a kill can leave in "
                "part: leave it out, or derive it from srpo_lightning.files.checkpoints.AtomicCheckpointIO"
            )
    own = [] if any(isinstance(plugin, CheckpointIO) for plugin in chosen) else [AtomicCheckpointIO()]
    return [*chosen, *own]


def is_first_rank() -> bool:
    """Whether this process is the run's first, by what launchers tell a process; the others rely on its word."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def others_have_started() -> bool:
    """Whether other ranks of the run wait for this one, by what launchers tell a process."""
    return any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def devices_here(trainer: Namespace) -> int:
    """As many as Lightning will use; other accelerators than CPUs and CUDA count as one."""
    is_cuda = trainer.accelerator in ("cuda", "gpu", "auto") and CUDAAccelerator.is_available()
    if not is_cuda and trainer.accelerator not in ("cpu", "auto"):
        return 1
    accelerator: type[Accelerator] = CUDAAccelerator if is_cuda else CPUAccelerator
    devices = accelerator.auto_device_count() if trainer.devices == "auto" else trainer.devices
    with naming(f"trainer.devices is {devices}"):
        parsed = accelerator.parse_devices(devices)
    count = parsed if isinstance(parsed, int) else len(parsed or ())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not is_cuda and count > max(cores, FEW_PROCESSES) and not others_have_started():
        raise ValueError(
            f"trainer.devices is {count}: of a CPU each is a process with models of its own, and there are {cores} "
            f"cores here; set it to 1, which uses all of them, or to {max(cores, FEW_PROCESSES)} at most"
        )
    return count
