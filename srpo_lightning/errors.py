"""What a parser or a library says of a user's settings, as one line that names the setting and the nearest right one.

jsonargparse explains an error by an indented tree: keys and classes as branches, what was expected as leaves.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, NamedTuple

from srpo_lightning.files.full_disk import CURE, is_full
from srpo_lightning.suggestions import class_names, nearest, nearest_setting, settings_of

TRACEBACK = "SRPO_TRACEBACK"
"""The environment variable that shows where a refusal comes from."""

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "Iterable": "a list",
    "Sequence": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "NoneType": "null",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of 0 or more",
    "ClosedUnitInterval": "a number from 0 to 1",
    "FiniteFloat": "a finite number",
}
"""Types in words."""


class Leaf(NamedTuple):
    """One reason why a value was not taken.

    Args:
        path: keys from the top, joined by dots.
        owner: class_path of the innermost class around it; empty where there is none.
        is_of_class: whether nothing but the class itself is in question.
        text: what was said.
    """

    path: str
    owner: str
    is_of_class: bool
    text: str


def explain(message: str, settings: Iterable[str]) -> str:
    """A parser's message as one line.

    Args:
        settings: dotted names of all settings there are.
    """
    message = re.sub(r"\b(?:fit|validate|test|predict)\.(?=\w+\.)", "", message)  # the command is known
    for pattern, words in WHOLE:
        if whole := re.search(pattern, message):
            return _joined(whole.expand(words))
    leaves, values = _leaves(message)
    if not leaves:
        return _joined(message)
    depth = max(leaf.path.count(".") for leaf in leaves)
    deepest = [leaf for leaf in leaves if leaf.path.count(".") == depth]
    value = values.get(deepest[0].path)
    found = f", found {'null' if value == 'None' else value}" if value is not None else ""
    expected = list(dict.fromkeys(words for leaf in deepest for words in _expected(leaf.text)))
    for leaf in deepest:
        if named := _unknown(leaf, set(settings), is_only=expected in ([], ["null"])):
            return named
    for leaf in deepest:
        if not _expected(leaf.text) and not UNKNOWN_CLASS.match(leaf.text):
            path = _of_class(leaf.path)
            is_tree = any(NOISE.match(line.strip()) for line in message.splitlines())
            return f"{path}: {_joined(leaf.text)}" if path else _joined(leaf.text if is_tree else message)
    if len(expected) < len(deepest) and any(UNKNOWN_CLASS.match(leaf.text) for leaf in deepest):
        expected.insert(0, "a class_path")
    if "a number" in expected:
        expected = [words for words in expected if words != "a whole number"]
    return _joined(f"{deepest[0].path}: expected {' or '.join(expected)}{found}")


WHOLE = (
    (r"Unable to load config '(?s:.*)Parser key \"(.*)\": Unable to load config \"(.*)\"",
     r"\1: expected its settings, or a file with them, found \2"),
    (r"Key \"([\w.]+)\.\w+\" not found in namespace", r"\1: expected its settings, found null"),
    (r"(?:File does not exist|Path is not a file): '(.*)'", r"\1: there is no such file"),
    (r"Problems parsing config: (?s:(.*))", r"the configuration is no YAML: \1"),
    (r"Unexpected config: *$", "the configuration is empty"),
    (r"Unexpected config: (.*)", r"the configuration is no mapping of settings: \1"),
    (r"^Linked \"(.*)\" must be given via \"(.*)\"", r"\1 follows \2: set that"),
    (r"^argument \w+\(model\) --> (data\.\w+): .*", r"\1 follows model.policy: set that"),
    (r"^the following arguments are required: (.*model\.policy.*)",
     r"these settings are missing: \1 (give them, or --config FILE)"),
    (r"^the following arguments are required: (.*)", r"these settings are missing: \1"),
    (r"^unrecognized arguments: ([^- ]\S*)", r"\1: names of settings begin with --; a file of them is --config \1"),
)  # fmt: skip
"""Messages that are no tree."""

VALUE = re.compile(r"\.? ?(?:Got value|Given value): (.*)$")
BRANCH = re.compile(r"(?:Parser key \"([^\"]+)\"|Problem with given class_path '([^']+)'):\s*")
CALLABLE = re.compile(r"^Type typing\.Callable.*? expects a function or a callable class: ")
NOISE = re.compile(
    "Expected a path but .* either not accessible or invalid|Does not validate against any|Subtypes: |Errors:|"
    r"Given value type: |Subclass types expect one of|a class path \(str\)|a dict with"
)
LONGEST_VALUE = 100


def _leaves(message: str) -> tuple[list[Leaf], dict[str, str]]:
    """The leaves of the tree, and the values that were found by their path; leaves that say nothing are left out."""
    branches: list[tuple[int, str, str]] = []  # indentation, key, class
    leaves: list[Leaf] = []
    values: dict[str, str] = {}
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(text)
        branches = [branch for branch in branches if branch[0] < indent]
        if CALLABLE.match(text) and (named := re.search(r"class_path'?[=:] ?'([^']+)'", message)):
            branches.append((indent, "", named[1]))
        text = CALLABLE.sub("", text).partition(". Got value: Namespace(")[0]
        while branch := BRANCH.match(text):
            branches.append((indent, branch[1] or "", branch[2] or ""))
            text = text[branch.end() :]
        path = ".".join(key or "init_args" for _, key, _ in branches)
        given = re.search(r"invalid literal .*: '(.*)'|(\S*[^\s:]) does not conform", text)
        if given:
            values[path] = given[1] or given[2]
        if (found := VALUE.search(text)) and "Namespace(" not in found[1]:
            own = found[1] if len(found[1]) <= LONGEST_VALUE else f"{found[1][:LONGEST_VALUE]} ..."
            values.setdefault(path, own)
        text = VALUE.sub("", text)
        if text and not NOISE.match(text):
            owner = next((name for _, _, name in reversed(branches) if name), "")
            leaves.append(Leaf(path, owner, bool(branches) and not branches[-1][1], text))
    named_leaves = [leaf for leaf in leaves if leaf.owner != "lightning.Callback"]  # tried where no class is given
    return named_leaves or leaves, values


def _expected(text: str) -> list[str]:
    """What a leaf says that it wants, in words."""
    if found := re.match(
        r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\]|tuple with (\d+) elements)", text
    ):
        if found[2]:
            return [name.strip().strip("'") for name in found[2].split(",")]
        kind = (found[1] or "").rpartition(".")[2]
        return [KINDS.get(kind, f"a {kind}") if kind else f"a list of {found[3]}"]
    if found := re.match(r"Not of type (\w+)|Not a valid subclass of (\w+)", text):
        return [KINDS.get(found[1], found[1]) if found[1] else f"the class_path and init_args of a {found[2]}"]
    return []


UNKNOWN_SETTING = re.compile(
    r"(?:Group '([^']+)' does not accept option|Subcommand '[^']+' does not accept option|Option|Key) '([^']+)'"
    r"(?: is not accepted.*)?$|unrecognized arguments: (?:--)?([^ =]+)"
)
UNKNOWN_CLASS = re.compile(
    r"Expected a dot import path string: (.*)|.*module '([\w.]+)' has no attribute '(\w+)'|.*No module named '([\w.]+)'"
)


def _unknown(leaf: Leaf, settings: set[str], is_only: bool) -> str | None:
    """A setting or a class that there is not, and what was likely meant.

    Args:
        is_only: whether nothing but a class is expected.
    """
    if found := UNKNOWN_SETTING.match(leaf.text):
        name = ".".join(filter(None, (found[1], found[2] or found[3])))
        path = f"{leaf.path}.{name}" if leaf.path else name
        if not leaf.owner:
            return f"{path}: there is no such setting{nearest_setting(path, settings) or '; --help shows all'}"
        own = settings_of(leaf.owner)
        near = nearest(name, [*own, "class_path", "init_args"])
        return f"{path}: there is no such setting{near or f'; {_last(leaf.owner)} has {_listed(own)}'}"
    if found := UNKNOWN_CLASS.match(leaf.text):
        attribute = f"{found[2]}.{found[3]}" if found[2] else found[4]
        name = found[1] or (leaf.owner if leaf.is_of_class else attribute)
        near = nearest(name, class_names())
        if near or is_only or "." in name:
            cure = near or "; give a class_path that can be imported, module.Class"
            return f"{_of_class(leaf.path)} is {name}: there is no such class{cure}"
    elif found := re.match("the following arguments are required: (.*)", leaf.text):
        return f"{_of_class(leaf.path)}: {_last(leaf.owner)} needs {found[1]}"
    return None


def _of_class(path: str) -> str:
    return re.sub(r"(?:^|\.)init_args$", "", path)


def _last(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


@contextmanager
def naming(setting: str | None = None) -> Iterator[None]:
    """What is raised within, by another package, becomes a refusal that names the setting, or the class that refused.

    Raises:
        ValueError: in its place.
    """
    try:
        yield
    except Exception as error:
        if is_own(error) and isinstance(error, ValueError | AssertionError):  # in our words, or no user's doing
            raise
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        name = setting or next(filter(None, map(_class_of, frames)), None)
        said = explain(str(error), ()) or type(error).__name__
        raise ValueError(f"{f'{name}: ' if name else ''}{said} ({TRACEBACK}=1 shows where)") from error


def _class_of(frame: FrameType) -> str | None:
    """Whose constructor a frame is, where it is one that a configuration names."""
    is_constructor = frame.f_code.co_name == "__init__" and "self" in frame.f_locals
    module = frame.f_globals.get("__name__", "")
    if not is_constructor or module.startswith(("jsonargparse", "argparse", "lightning.pytorch.cli")):
        return None
    cls = type(frame.f_locals["self"])
    return None if cls.__module__ == "srpo_lightning.trainer_cli" else cls.__name__


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error that is their own doing; None for any other, whose traceback is needed."""
    if isinstance(error, (ValueError, FloatingPointError)) and is_own(error):
        return _joined(str(error))
    if is_full(error):
        return f"the disk is full ({_joined(error)}): {CURE}"
    if isinstance(error, argparse.ArgumentError):
        return explain(str(error), ())
    import torch  # not at the top: what is refused above needs none of it
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return f"{_joined(str(error))} ({TRACEBACK}=1 shows where)"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        cure = "`estimate` says what fits; smaller are data.batch_size, model.policy.init_args.height and width"
        return f"{_joined(str(error).partition('. ')[0])}: {cure} ({TRACEBACK}=1 shows where)"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror} ({TRACEBACK}=1 shows where)"
    return None


OWN = {Path(__file__).parent}
"""Folders whose errors are in the user's words; a program beside the package adds its own."""


def is_own(error: BaseException) -> bool:
    """Whether the project raised an error itself, in its own words; what a library raised keeps its traceback."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in OWN)


def _joined(text: Any) -> str:
    return " ".join(str(text).split())
