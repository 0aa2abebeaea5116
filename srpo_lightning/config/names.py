"""Names of settings, read from the text of what takes them: a typo is refused before anything is imported."""

import ast
from collections.abc import Collection, Iterator, Sequence, Set
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from srpo_lightning.suggestions import moved, nearest_setting

COMMANDS = {
    "fit": "Train, or go on with a run (--ckpt_path last).",
    "validate": "Measure the weights of a checkpoint, or those before training, on the evaluation prompts.",
    "test": "Measure them as validate does.",
    "predict": "Draw a picture of every evaluation prompt.",
}
"""The commands that take a whole configuration, and what they do."""

OWNERS = {
    "trainer": ("lightning.pytorch.trainer.trainer", "Trainer"),
    "model": ("srpo_lightning.module", "SRPOModule"),
    "data": ("srpo_lightning.data.datamodule", "PromptData"),
    "checkpoint": ("srpo_lightning.callbacks.checkpoint", "RunCheckpoint"),
}
"""Groups of a configuration: the module and the class whose arguments they hold."""

ALWAYS = {"config", "print_config", "help"}
GENERAL = ALWAYS | {"seed_everything", "memory_check", "default_callbacks", *OWNERS, *COMMANDS}


class Callee(NamedTuple):
    """What is called with settings.

    Args:
        names: Names of its arguments.
        summary: First line of its docstring.
    """

    names: frozenset[str]
    summary: str


def callee(module: str, name: str) -> Callee | None:
    """Read the arguments of a function, a method or a class; None where its file does not tell them.

    Args:
        module: Dotted name of the module, which is not imported.
        name: Name of a function or a class, or of a class and its method with a dot between.
    """
    found: Any = _parsed(module)
    for part in name.split("."):
        found = next((own for own in getattr(found, "body", ()) if getattr(own, "name", None) == part), None)
    summary = (ast.get_docstring(found) or "").partition("\n")[0] if found else ""
    if isinstance(found, ast.ClassDef):
        found = next((own for own in found.body if getattr(own, "name", None) == "__init__"), None)
    if not isinstance(found, ast.FunctionDef) or found.args.kwarg:
        return None
    names = {argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)}
    return Callee(frozenset(names - {"self"}), summary)


@cache
def _parsed(module: str) -> ast.Module | None:
    package, *rest = module.split(".")
    spec = find_spec(package)  # of a package at the top: this imports nothing
    folders = spec.submodule_search_locations if spec else None
    path = Path(*folders, *rest).with_suffix(".py") if folders else None
    return ast.parse(path.read_bytes()) if path and path.is_file() else None


def known_names(command: str) -> set[str] | None:
    """The names of a command's settings, at most two deep; None where they cannot be told.

    Args:
        command: Name of the command: fit, validate, test or predict.
    """
    names = GENERAL | ({"output"} if command == "predict" else set())
    method = callee("lightning.pytorch.trainer.trainer", f"Trainer.{command}")
    groups = {group: callee(*owner) for group, owner in OWNERS.items()}
    if method is None or None in groups.values():
        return None
    return names | method.names | {f"{group}.{name}" for group, own in groups.items() if own for name in own.names}


def check_options(arguments: Sequence[str], known: Set[str] | None) -> None:
    """Refuse options that there are not, and classes that lie elsewhere now.

    What is deeper than `known`, or only the beginning of a name in it, is left to the parser.

    Args:
        arguments: Command line behind the command.
        known: Names of settings; None leaves all names to the parser.

    Raises:
        ValueError: naming the option and the nearest one.
    """
    for option, value in _options(arguments):
        if option.startswith("--") and len(option) > len("--"):
            name = option.removeprefix("--").removesuffix("+")
            _check_name(name, known)
            _check_class(name, value)


def check_files(arguments: Sequence[str], known: Set[str] | None) -> None:
    """Refuse the same of the files that `--config` names.

    Raises:
        ValueError: naming the setting and the nearest one.
    """
    for option, value in _options(arguments):
        if option in ("-c", "--config"):
            settings = _mapping(value)
            for name in _names_of(settings, "", known or ()):
                _check_name(name, known)
            for name, text in _texts("", settings, set()):
                _check_class(name, text)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word, and the value that is its own behind `=`, or the word that follows."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, _, value = word.partition("=")
        yield option, value or following


def _check_name(name: str, known: Set[str] | None) -> None:
    if known is None:
        return
    depth = 1 + max(other.count(".") for other in known)
    head = ".".join(name.split(".")[:depth])
    if not any(other.startswith(head) for other in known):
        raise ValueError(f"{name}: there is no such setting{nearest_setting(name, known) or '; --help shows all'}")


def _check_class(name: str, value: str) -> None:
    if new := moved(value):
        raise ValueError(f"{name.removesuffix('.class_path')} is {value}, which is {new} now")


def _names_of(settings: dict[Any, Any], prefix: str, known: Collection[str]) -> Iterator[str]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        is_group = any(other.startswith(f"{name}.") for other in known)
        if isinstance(key, str) and isinstance(value, dict) and value and is_group:
            yield from _names_of(value, f"{name}.", known)
        elif isinstance(key, str):
            yield name.removesuffix("+")


def _texts(name: str, value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    """The texts in nested settings, and where they are; YAML lets a list hold itself."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        named = value.items() if isinstance(value, dict) else (("", own) for own in value)
        for key, own in named:
            yield from _texts(f"{name}.{key}".strip("."), own, seen)


def _mapping(file: str) -> dict[Any, Any]:
    import yaml  # where no file is named it is not needed

    try:
        settings = yaml.safe_load(Path(file).expanduser().read_bytes())
    except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong
        return {}
    return settings if isinstance(settings, dict) else {}
