"""The command line: each command imports what it needs when it is called."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

from srpo_lightning import __version__
from srpo_lightning.config.names import ALWAYS, COMMANDS, callee, check_files, check_options, known_names
from srpo_lightning.config.shipped import with_recipes
from srpo_lightning.errors import TRACEBACK, one_line
from srpo_lightning.files.quiet import quiet_first
from srpo_lightning.suggestions import nearest

if TYPE_CHECKING:
    from srpo_lightning.config.arguments import Parser

JOBS = {
    "cache": "srpo_lightning.jobs.cache",
    "compare": "srpo_lightning.jobs.compare",
    "control-words": "srpo_lightning.jobs.control_words",
    "convert": "srpo_lightning.jobs.convert",
    "downloads": "srpo_lightning.jobs.downloads",
    "estimate": "srpo_lightning.jobs.estimate.job",
    "export": "srpo_lightning.jobs.export.job",
    "init": "srpo_lightning.jobs.init.job",
    "rate": "srpo_lightning.jobs.rate.job",
    "recipes": "srpo_lightning.jobs.recipes",
    "report": "srpo_lightning.jobs.report",
    "reward-bias": "srpo_lightning.jobs.reward_bias",
    "stand-in": "srpo_lightning.jobs.stand_in",
}
"""The commands that are a function of the command's name, and its module."""

SYNONYMS = {"train": "fit", "eval": "validate", "evaluate": "validate", "sample": "predict", "generate": "predict"}
"""What other programs call these."""

GONE = {"benchmark": "python -m experiments.objectives"}
"""What commands of older versions are now."""

SEVERAL = (
    "Configuration file that `fit` would get. Given again, it changes what the one before it says, and so do settings "
    "of `fit`, such as --model.policy.init_args.height 512."
)
"""Help of `--config` of a command that reads a run's."""

OF_RUNS = ("cache", "downloads", "estimate")
"""Commands that take the configuration and the settings of `fit`."""

PLAIN = {
    "runs": ("+", "RUN", "Folder of a run, which `fit` was given as trainer.default_root_dir."),
    "recipe": ("?", "RECIPE", "Name of a recipe whose file is printed; without one all are listed."),
}
"""Arguments that are given without an option: how many, their name and their help."""


def main(args: list[str] | None = None) -> None:
    """Run `python -m srpo_lightning`; what it refuses ends in one line.

    Args:
        args: Command line; None reads it from the process.
    """
    words = sys.argv[1:] if args is None else args
    with as_program():
        words = with_recipes(words)
        check_command(words)
        command = words[0]
        if command in ("-h", "--help"):
            print(overview())
        elif command == "--version":
            print(f"srpo-lightning {__version__}")
        elif command in COMMANDS:
            known = known_names(command)
            check_settings(words[1:], known, known)
            from srpo_lightning.trainer_cli import run_trainer  # imports take seconds, which a typo need not wait for

            without_progress_bars()
            if args is None:  # Lightning reads them there, and so do the processes that it starts
                sys.argv[1:] = words
            run_trainer(None if args is None else words, command)
        else:
            name = command.replace("-", "_")
            job = callee(JOBS[command], name)
            own = job.names | ALWAYS if job else None
            settings: Set[str] | None = known_names("fit") if command in OF_RUNS else frozenset()
            both = None if own is None or settings is None else own | settings
            # A job's own `config` is that of a run.
            check_settings(words[1:], both, known_names("fit") if job and "config" in job.names else own)
            if own and settings:
                words = with_settings(words, settings - own)
            run_job(getattr(import_module(JOBS[command]), name), f"srpo_lightning {command}", words[1:])


def with_settings(words: Sequence[str], names: Set[str]) -> list[str]:
    """A command line whose settings of a run, `--NAME VALUE`, are parts of its configuration: `--config=--NAME=VALUE`.

    Args:
        words: Command line.
        names: Names of these settings; what is deeper in one of them counts too.

    Raises:
        ValueError: naming the setting, if the last one has no value.
    """
    made, rest = [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").removesuffix("+")
        if word.startswith("--") and any(name == own or name.startswith(f"{own}.") for own in names):
            found = value if equals else next(rest, None)
            if found is None:
                raise ValueError(f"{name}: its value is missing")
            made.append(f"--config={option}={found}")
        else:
            made.append(word)
    return made


@contextmanager
def as_program() -> Iterator[None]:
    """Around everything that a program does: silence about what does not concern its user, and errors in one line."""
    quiet_first()
    try:
        yield
    except KeyboardInterrupt as error:  # before the first step: nothing is lost
        raise SystemExit(128 + signal.SIGINT) from error
    except Exception as error:
        line = one_line(error)
        if line is None:
            from srpo_lightning.training.agreement import lost_rank  # torch, which then is there

            line = lost_rank(error)
        if os.environ.get(TRACEBACK) or line is None:
            raise
        raise SystemExit(f"error: {line}") from error


def check_command(words: list[str]) -> None:
    """Refuse a command that there is not, and none at all."""
    commands = [*COMMANDS, *JOBS]
    known = f"the commands are {', '.join(commands)}; each has its own --help"
    if not words:
        raise ValueError(f"no command: {known}")
    if words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        raise ValueError(f"{words[0]} comes before the command, which is first: {known}")
    if not words[0].startswith("-") and words[0] not in commands:
        likely = f"; did you mean {SYNONYMS[words[0]]}?" if words[0] in SYNONYMS else nearest(words[0], commands)
        now = f"; it is `{GONE[words[0]]}` now" if words[0] in GONE else None
        raise ValueError(f"{words[0]}: there is no such command{now or likely or f': {known}'}")


def check_settings(words: list[str], known: Set[str] | None, known_in_files: Set[str] | None) -> None:
    """Refuse typos and what lies elsewhere now, but where help is asked for."""
    if not {"-h", "--help"} & set(words):
        check_options(words, known)
        check_files(words, known_in_files)


def overview() -> str:
    """The commands, and what each does."""
    jobs = {command: callee(module, command.replace("-", "_")) for command, module in JOBS.items()}
    told = COMMANDS | {command: job.summary if job else "" for command, job in jobs.items()}
    return "\n".join(
        ["usage: python -m srpo_lightning COMMAND [SETTINGS]", "", "commands, each with its own --help:"]
        + [f"  {command:<15}{summary}" for command, summary in told.items()]
    )


def run_job(job: Callable[..., None], name: str, args: list[str]) -> None:
    """Run a function whose arguments are the command line's.

    Args:
        job: Function to run.
        name: Name of the program and the command, for the help.
        args: Command line behind that name.
    """
    without_progress_bars()
    parser = job_parser(job, name)
    values = parser.instantiate_classes(parser.parse_args(args))
    job(**{argument: values[argument] for argument in signature(job).parameters})


def job_parser(job: Callable[..., None], name: str) -> "Parser":
    """What reads the command line of a function.

    Args:
        job: Function that the command line is for.
        name: Name of the program and the command, for the help.
    """
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # it is public and documented

    from srpo_lightning.config.arguments import Parser

    own = signature(job).parameters
    parser = Parser(prog=name, description=(job.__doc__ or "").partition("\n")[0])
    takes_several = "config" in own and own["config"].annotation == list[str]
    if takes_several:
        parser.add_argument("--config", action="append", required=True, help=SEVERAL)
    elif "config" not in own:
        parser.add_argument("--config", action=ActionConfigFile, help="File with the arguments below.")
    skip: set[str | int] = {"config"} if takes_several else set()
    for argument in [name for name in PLAIN if name in own]:
        number, metavar, text = PLAIN[argument]
        parser.add_argument(argument, nargs=number, type=str, metavar=metavar, help=text)
        skip.add(argument)
    parser.add_function_arguments(job, as_positional=False, skip=skip, sub_configs=True)
    return parser


def without_progress_bars() -> None:
    """Read weights silently."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
