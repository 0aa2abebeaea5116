"""The command line: LightningCLI with one module, one data module and one fixed run folder; jobs without a model."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # it is public and documented
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from transformers.utils.logging import disable_progress_bar

from srpo_lightning.callbacks.agreement import Agreement
from srpo_lightning.callbacks.predictions import Predictions
from srpo_lightning.callbacks.progress import Progress
from srpo_lightning.callbacks.settings import RunSettings, settings_of
from srpo_lightning.config.arguments import COMMANDS, Parser, add_project_arguments, choose_strategy
from srpo_lightning.config.effects import check_effects, check_single
from srpo_lightning.config.loops import check_loops
from srpo_lightning.data import PromptData
from srpo_lightning.errors import TRACEBACK, naming, nearest, one_line
from srpo_lightning.files.checkpoints import AtomicCheckpointIO, check_whole, complete_or_absent
from srpo_lightning.jobs.cache import cache
from srpo_lightning.jobs.control_words import control_words
from srpo_lightning.jobs.convert import convert
from srpo_lightning.jobs.estimate.job import estimate
from srpo_lightning.jobs.estimate.room import check_room
from srpo_lightning.jobs.export.job import export
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.agreement import lost_rank

JOBS: dict[str, Callable[..., None]] = {
    "cache": cache,
    "control-words": control_words,
    "convert": convert,
    "estimate": estimate,
    "export": export,
}

SYNONYMS = {"train": "fit", "eval": "validate", "evaluate": "validate", "sample": "predict", "generate": "predict"}
"""What other programs call these."""

QUIET = (
    "Found .* in eval mode",  # frozen parts stay in evaluation mode on purpose
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning 2.6 on torch 2.13
    "Mismatch dtype between input and weight",  # diffusers' RMSNorm under autocast
    "The '.*_dataloader' does not have many workers",  # features are small files: workers gain nothing
    "Precision bf16-mixed is not supported by the model summary",
    "You're resuming from a checkpoint that ended before the epoch ended",  # the data module goes on where it stood
    "You are using a custom batch sampler",  # it returns every prompt
)


def main(args: ArgsType = None) -> None:
    """Run `python -m srpo_lightning`; what it refuses ends in one line.

    Args:
        args: the command line; None reads it from the process.
    """
    words = sys.argv[1:] if args is None else args
    with as_program():
        check_command(words)
        if isinstance(words, list) and words[0] in JOBS:
            run_job(JOBS[words[0]], f"srpo_lightning {words[0]}", words[1:])
        else:
            run_trainer(args, words[0] if isinstance(words, list) else None)


@contextmanager
def as_program() -> Iterator[None]:
    """Around everything that a program does: silence about what does not concern its user, and errors in one line."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    disable_progress_bar()  # of reading weights
    try:
        yield
    except KeyboardInterrupt as error:  # before the first step: nothing is lost
        raise SystemExit(128 + signal.SIGINT) from error
    except Exception as error:
        line = one_line(error) or lost_rank(error)
        if os.environ.get(TRACEBACK) or line is None:
            raise
        raise SystemExit(f"error: {line}") from error


def check_command(args: ArgsType) -> None:
    """Refuse a command that there is not, and none at all."""
    if not isinstance(args, list):
        return
    commands = [*COMMANDS, *JOBS]
    known = f"the commands are {', '.join(commands)}; each has its own --help"
    if not args:
        raise ValueError(f"no command: {known}")
    if args[0].startswith("-") and args[0] not in ("-h", "--help"):
        raise ValueError(f"{args[0]} comes before the command, which is first: {known}")
    if not args[0].startswith("-") and args[0] not in commands:
        likely = f"; did you mean {SYNONYMS[args[0]]}?" if args[0] in SYNONYMS else nearest(args[0], commands)
        raise ValueError(f"{args[0]}: there is no such command{likely or f': {known}'}")


def run_trainer(args: ArgsType, command: str | None) -> None:
    """Run fit, validate, test or predict; without `args` Lightning reads the process's, and is content."""
    SRPOCLI(
        SRPOModule,
        PromptData,
        args=args,
        command=command,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"epilog": f"Also, each with its own --help: {', '.join(JOBS)}."},
        save_config_callback=SaveConfigInRunFolder,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # nothing reads settings from a checkpoint
    )


def run_job(job: Callable[..., None], name: str, args: list[str]) -> None:
    """Run a function whose arguments are the command line's.

    Args:
        job: the function.
        name: the program and the command, for its help.
        args: the command line behind the name.
    """
    own = signature(job).parameters
    parser = Parser(prog=name, description=(job.__doc__ or "").partition("\n")[0])
    if "config" not in own:
        parser.add_argument("--config", action=ActionConfigFile, help="a file with the arguments below")
    parser.add_function_arguments(job, as_positional=False, sub_configs=True)
    values = parser.instantiate_classes(parser.parse_args(args))
    job(**{argument: values[argument] for argument in own})


class SRPOCLI(LightningCLI):
    """LightningCLI plus: links, the run folder, and what `last` means.

    Args:
        command: what is asked for, where the command line begins with it.
    """

    def __init__(self, *args: Any, command: str | None, **kwargs: Any) -> None:
        self.command = command
        with ExitStack() as self.held:  # until the command has run, which the constructor does
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is said once counts everywhere."""
        add_project_arguments(parser)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method, called on the object
        """The command that is asked for alone, where it is known: the settings of each take long to collect."""
        commands = super().subcommands()
        return {self.command: commands[self.command]} if self.command in commands else commands

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_class_arguments(Predictions, as_group=False)
        # No code is read from a checkpoint, and predictions are files, not a list that grows.
        settings = {"weights_only": True, "return_predictions": False}
        parser.set_defaults({k: v for k, v in settings.items() if k in self._subcommand_method_arguments[subcommand]})
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log into the run folder, in one place however often the run is resumed; what is no part of it apart."""
        config = self.config[self.config.subcommand]
        if config.trainer.logger in (None, True):
            run = RunFolder(config.trainer.default_root_dir)
            logs = (run if self.config.subcommand == "fit" else run.validation).logs
            kwargs["logger"] = TensorBoardLogger(logs.parent, name=logs.name, version="")
        with naming():
            return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        chosen = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        has_choice = config["enable_progress_bar"] is False or any(isinstance(c, ProgressBar) for c in chosen)
        # A rich progress bar prints nothing into the log of a batch job.
        progress = [] if has_choice or sys.stdout.isatty() else [TQDMProgressBar(refresh_rate=10)]
        predictions = [Predictions(self.config.predict.output)] if self.config.subcommand == "predict" else []
        settings = settings_of(self.config[self.config.subcommand].as_dict())
        agreement = Agreement(settings, self.config[self.config.subcommand].ckpt_path, self.refusal)
        check_single([*filter(None, chosen), *callbacks])
        plugins = with_atomic_checkpoints(config.get("plugins"))
        # Agreement comes before any that reads weights.
        config = config | {"callbacks": [agreement, *filter(None, chosen)], "plugins": plugins}
        last = [RunSettings(settings), *predictions, Progress()]
        return super()._instantiate_trainer(config, [*callbacks, *progress, *last])

    def _set_seed(self) -> None:
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 1 << 32:
            raise ValueError(
                f"seed_everything is {str(seed).lower()}: every random number follows from it, give a whole number "
                f"from 0 to {(1 << 32) - 1}"
            )
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Read no settings from a checkpoint: the configuration holds all of them."""

    refusal: str | None = None
    """Why this rank found no checkpoint, until the other ranks know."""

    def before_instantiate_classes(self) -> None:
        """Settle how devices are used and what to resume before anything is read."""
        config = self.config[self.config.subcommand]
        for name in ("trainer", "model", "data", "checkpoint"):
            if not isinstance(config[name], Namespace):
                raise ValueError(f"{name}: expected its settings, found {config[name] or 'null'}")
        if not config.trainer.default_root_dir:
            raise ValueError("trainer.default_root_dir is empty: give the folder of the run, for instance runs/first")
        check_loops(config.trainer, self.config.subcommand)
        chosen = choose_strategy(config, devices_here(config.trainer))
        if chosen:
            rank_zero_info(chosen)
        if self.config.subcommand == "fit" and is_first_rank() and not config.trainer.fast_dev_run:
            self.held.enter_context(RunFolder(config.trainer.default_root_dir).lock())
        try:
            self._find_checkpoint(config)
        except ValueError as error:
            if not others_have_started():
                raise
            self.refusal, config.ckpt_path = str(error), None
        if config.trainer.fast_dev_run:
            config.trainer.default_root_dir = str(RunFolder(config.trainer.default_root_dir).trial.path)

    def _find_checkpoint(self, config: Namespace) -> None:
        run = RunFolder(config.trainer.default_root_dir)
        if config.ckpt_path is not None:
            found = run.find_checkpoint(config.ckpt_path, config.checkpoint.monitor, config.checkpoint.mode)
            rank_zero_info(f"--ckpt_path {config.ckpt_path}: {found}")
            check_whole(found, content=is_first_rank())
            config.ckpt_path = str(found)
        elif self.config.subcommand == "fit" and run.checkpoints() and not config.trainer.fast_dev_run:
            raise ValueError(
                f"{config.trainer.default_root_dir} holds a run already: resume it with --ckpt_path last, name another "
                "folder with --trainer.default_root_dir, or delete it"
            )

    def after_instantiate_classes(self) -> None:
        """Everything knows its settings; nothing is read but then the prompts."""
        check_effects(self.config.subcommand, self.trainer, self.model, self.datamodule)
        self.datamodule.read(trains=self.config.subcommand == "fit")

    def before_fit(self) -> None:
        """Refuse what cannot fit, once per node, while nothing of the models but their shapes is known."""
        if self.config.fit.memory_check and self.trainer.local_rank == 0:
            check_room(self.config.fit, self.trainer)


class SaveConfigInRunFolder(SaveConfigCallback):
    """Writes config.yaml into the run folder, and config-step-*.yaml when the run is resumed."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the record of every start."""
        if stage != "fit":
            return
        path = RunFolder.of(trainer).config(Path(self.config.ckpt_path) if self.config.ckpt_path else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming("this configuration cannot be written down"), complete_or_absent(path) as partial:
            self.parser.save(self.config, str(partial), skip_none=False, overwrite=True, multifile=False)


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
                "part: leave it away, or derive it from srpo_lightning.files.checkpoints.AtomicCheckpointIO"
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
    return parsed if isinstance(parsed, int) else len(parsed or ())
