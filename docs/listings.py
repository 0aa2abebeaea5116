"""What pages list of the code, as MyST's definition lists: commands, settings and numbers."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from srpo_lightning.callbacks.predictions import Predictions
from srpo_lightning.cli import JOBS, job_parser
from srpo_lightning.config.arguments import Parser, config_parser
from srpo_lightning.config.names import COMMANDS
from srpo_lightning.errors import KINDS
from srpo_lightning.evaluation.meanings import FAMILIES, MEANINGS

GROUPS = {
    "": "What a run is: its random numbers, and what it goes on from.",
    "model": "What is trained, and how: policy, reward, objective and optimizer are each a class of the "
    "[reference](reference.md).",
    "data": "Prompts and pictures, and how their features are kept.",
    "checkpoint": "When checkpoints are written, and which of them stay.",
    "trainer": "Lightning's Trainer: devices, precision, length, folder and callbacks.",
}
"""The parts of a configuration, in the order of the page."""

UNSAID = {"help", "print_config", "weights_only", "return_predictions"}
"""What every parser has, and what this project has settled."""

SOURCES = "a path, a mapping, or a list of these"
WORDS = KINDS | {
    "str, Path": "a text",
    "bool | int": "a whole number",
    "int, float": "a number",
    "list[str]": "a list of texts",
    "str | dict[str, Any] | list[str | dict[str, Any]]": SOURCES,
    "str, dict[str, Any], list[str | dict[str, Any]]": SOURCES,
    "Callable[[Iterable], Optimizer]": "the class_path and init_args of an optimizer",
    "Callable[[Optimizer], Union[LRScheduler, ReduceLROnPlateau]]": "the class_path and init_args of a scheduler",
    "Policy": "the class_path and init_args of a Policy",
    "Reward": "the class_path and init_args of a Reward",
    "Objective": "the class_path and init_args of an Objective",
}
"""Types in words."""

NO_HELP = {
    "seed_everything": "Number from which every random number of the run follows.",
}
"""Help of what has none of its own."""

CHECKPOINT = "Checkpoint to go on from or to read: `last`, `best` (in checkpoint.monitor) or a path; null is none."
"""Help of `--ckpt_path`, of which Lightning's own tells what its Trainer alone would do."""


def commands() -> str:
    """Every command with its own arguments."""
    parts = []
    for command, summary in COMMANDS.items():
        own = listed(settings(trainer_parser(command)))
        text = "Takes a [configuration](configuration.md), `--config FILE`, any number of times, and besides:"
        parts.append(f"## {command}\n\n{summary} {text}\n\n{own}")
    for command, module in JOBS.items():
        job = getattr(import_module(module), command.replace("-", "_"))
        parser = job_parser(job, command)
        parts.append(f"## {command}\n\n{plain(parser.description or '')}\n\n{listed(settings(parser))}")
    return "\n\n".join(parts)


def trainer_parser(command: str) -> Parser:
    """What reads a trainer command's own settings.

    Args:
        command: Name of the command: fit, validate, test or predict.
    """
    parser = Parser()
    parser.add_method_arguments(Trainer, command, skip=set(LightningCLI.subcommands()[command]))
    if command == "predict":
        parser.add_class_arguments(Predictions, as_group=False)
    return parser


def configuration() -> str:
    """Every key of a configuration."""
    groups: dict[str, list[Any]] = {name: [] for name in GROUPS}
    for setting in settings(config_parser()):
        head, _, rest = setting.dest.partition(".")
        groups[head if rest else ""].append(setting)
    titles = {name: f"## {name or 'at the top'}\n\n{text}" for name, text in GROUPS.items()}
    return "\n\n".join(f"{titles[name]}\n\n{listed(own, '')}" for name, own in groups.items())


def metrics() -> str:
    """Every number of a run."""
    families = {f"{name}...": text.replace("{rest}", "`...`") for name, text in FAMILIES.items()}
    texts = {**MEANINGS, **families}
    return "\n\n".join(f"`{name}`\n: {plain(text)}" for name, text in texts.items())


LISTINGS: Mapping[str, Callable[[], str]] = {"commands": commands, "configuration": configuration, "metrics": metrics}
"""By the word behind `@` that stands for them on a page."""


def settings(parser: Parser) -> Iterator[Any]:
    """The arguments of a parser, as argparse keeps them, but for what no user sets."""
    for action in parser._actions:
        is_own_file = action.dest == "config" and not action.required  # every command's, not a configuration's
        is_link = type(action).__name__ == "ActionLink"
        is_group = action.default == "==SUPPRESS=="
        if is_group or action.dest in UNSAID:
            continue
        if not is_own_file and not is_link and not action.dest.endswith(".help"):
            yield action


def listed(actions: Iterable[Any], dashes: str = "--") -> str:
    """Arguments, each with its type, default and help."""
    return "\n\n".join(entry(action, dashes) for action in actions)


def entry(action: Any, dashes: str) -> str:
    """One argument as a term and its definition."""
    name = f"{dashes}{action.dest}" if action.option_strings else f"{action.metavar or action.dest} ..."
    given = "must be given" if action.required else f"default `{value(action.default)}`"
    text = CHECKPOINT if action.dest == "ckpt_path" else plain(action.help or NO_HELP.get(action.dest, ""))
    return f"`{name}` {kind(action)}, {given}\n: {text}"


def kind(action: Any) -> str:
    """The type of an argument: in words where there are any, otherwise as code without the names of modules."""
    hint = getattr(action, "_typehint", None) or action.type or str
    text = hint.__name__ if isinstance(hint, type) else re.sub(r"<class '([^']*)'>", r"\1", str(hint))
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    text = re.sub(r"^(?:Optional|Union)\[(.*?)(?:, NoneType)?\]$", r"\1 | None", text)
    own, end = (text.removesuffix(" | None"), " or null") if text.endswith(" | None") else (text, "")
    return WORDS.get(own, f"`{own}`") + end


def value(default: Any) -> str:
    """A default as YAML has it."""
    if isinstance(default, Namespace):
        default = default.as_dict()
    if isinstance(default, dict) and "class_path" in default:
        own = ", ".join(f"{name}: {value(given)}" for name, given in (default.get("init_args") or {}).items())
        return f"{default['class_path'].rpartition('.')[2]}({own})"
    return default if isinstance(default, str) and default else json.dumps(default, default=str)


def plain(text: str) -> str:
    """A help text, whose reStructuredText roles and signs mean nothing in Markdown, without a default of its own."""
    text = re.sub(r"\s*Default(?:s to|:) [^ ]+?\.?$", "", " ".join(text.split()))
    text = re.sub(r":\w+:`~?(?:[^`<]*\.)?([^`<.]+?)(?: *<[^`]*>)?`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]])", r"\\\1", part) for part in parts)
