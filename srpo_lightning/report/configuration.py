"""The configuration of a run: what was asked for in words, and what in it is not as the recipe or the defaults are."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple

import yaml

from srpo_lightning.files.records import Record
from srpo_lightning.run_folder import RunFolder

OWNERS = {
    "trainer": "lightning.pytorch.Trainer",
    "model": "srpo_lightning.module.SRPOModule",
    "data": "srpo_lightning.data.PromptData",
    "checkpoint": "srpo_lightning.callbacks.RunCheckpoint",
}
"""The classes whose arguments a configuration has without naming them."""

IMPORTED = ("srpo_lightning", "lightning", "torch")
"""The packages whose classes are looked at for their defaults: to look at a page's settings runs no foreign code."""

OF_ONE_START = ("ckpt_path", "weights_only", "config", "trainer.default_root_dir")
"""Settings of a single start, which make no other run."""

REQUIRED = "(no default)"
LONGEST = 300


class Setting(NamedTuple):
    """A setting.

    Args:
        name: Dotted name; `init_args` are left out, and members of lists are named by their class.
        value: Value in the configuration; of a class its name.
        default: Default of its class, REQUIRED where it has none.
        has_known_default: Whether the default could be read.
    """

    name: str
    value: Any
    default: Any = None
    has_known_default: bool = False


def read_configuration(run: RunFolder) -> tuple[str, dict[str, Any]]:
    """The settings of the run's last start, as the file has them and as nested mappings; empty where there is no file.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    files = run.configs()
    if not files:
        return "", {}
    text = files[-1].read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"configuration {files[-1]} cannot be read: {type(error).__name__}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"configuration {files[-1]} holds no settings")
    return text, settings


def flat(value: Any, name: str = "", owner: str | None = None) -> Iterator[Setting]:
    """The settings in a configuration.

    Args:
        value: Part of a configuration.
        name: Dotted name of that part.
        owner: Class path of what takes the settings in it.
    """
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        yield from flat(value.get("init_args") or {}, name, value["class_path"])
    elif isinstance(value, Mapping):
        defaults = defaults_of(owner)
        for key, own in value.items():
            path = f"{name}.{key}" if name else str(key)
            if not is_part(own):
                yield Setting(path, own, defaults.get(key), key in defaults)
            elif class_of(own):
                yield Setting(path, class_of(own), defaults.get(key), key in defaults)
            yield from flat(own, path, owner=OWNERS.get(path)) if is_part(own) else ()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, own in enumerate(value):
            path = f"{name}[{class_of(own) or number}]"
            if class_of(own):
                yield Setting(path, class_of(own))
            yield from flat(own, path)


def is_part(value: Any) -> bool:
    """Whether settings are in a value: a mapping, or a list of mappings."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return (isinstance(value, Mapping) and bool(value)) or (is_list and any(isinstance(own, Mapping) for own in value))


def class_of(value: Any) -> str:
    """The name of the class that a part of a configuration is of; empty where it names none."""
    path = value.get("class_path") if isinstance(value, Mapping) else None
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def defaults_of(class_path: str | None) -> dict[str, Any]:
    """The plain defaults of a class's arguments, those that it hands on to its bases too; none of foreign classes."""
    if class_path is None or class_path.partition(".")[0] not in IMPORTED:
        return {}
    try:
        found = resolve_name(class_path)
        bases = [own for own in getattr(found, "__mro__", ()) if "__init__" in vars(own) and own is not object]
        parameters = [inspect.signature(own).parameters for own in bases]
    except (ImportError, AttributeError, ValueError, TypeError):  # it has another name by now
        return {}
    defaults: dict[str, Any] = {}
    for own in parameters:
        named = {name: p.default for name, p in own.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        defaults = {name: REQUIRED if value is inspect.Parameter.empty else value for name, value in named.items()} | (
            defaults
        )
    return {name: plain(value) for name, value in defaults.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a configuration file could hold a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def plain(value: Any) -> Any:
    """A value as a configuration file has it."""
    return [plain(own) for own in value] if isinstance(value, list | tuple) else value


def departures(run: RunFolder, settings: Mapping[str, Any]) -> Record:
    """In what a configuration differs, and from what: the recipe that the run recorded, or the defaults of its classes.

    Raises:
        ValueError: if the recipe cannot be read.
    """
    now = {own.name: own for own in flat(settings) if own.name not in OF_ONE_START}
    files, recipe = read_recipe(run)
    if recipe is None:
        found = [
            (own.name, own.value, own.default)
            for own in now.values()
            if own.has_known_default and own.value != own.default
        ]
        return {"from": "the defaults of its classes", "rows": found}
    then = {own.name: own.value for own in flat(recipe) if own.name not in OF_ONE_START}
    rows = [(name, own.value, then.get(name)) for name, own in now.items() if own.value != then.get(name)]
    # What the recipe alone has: a class that was left out.
    rows += [(name, None, value) for name, value in then.items() if name not in now and "[" in name and class_in(name)]
    return {"from": ", ".join(files), "rows": rows}


def class_in(name: str) -> bool:
    """Whether a dotted name is that of a member of a list itself."""
    return name.endswith("]")


def read_recipe(run: RunFolder) -> tuple[list[str], Record | None]:
    """The names of the configuration files that a run was started with, and all that they set; None: not known.

    Raises:
        ValueError: if the record cannot be read.
    """
    if not run.recipe.is_file():
        return [], None
    try:
        found = json.loads(run.recipe.read_text(encoding="utf-8"))
        files, settings = [str(file) for file in found["files"]], found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.recipe} cannot be read: {type(error).__name__}") from error
    return files, settings if isinstance(settings, dict) else None


def asked_for(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked for, as pairs of a heading and words; what the configuration does not say is left out."""
    model, data, trainer = (settings.get(name) or {} for name in ("model", "data", "trainer"))
    listed = trainer.get("callbacks") or []
    callbacks = {class_of(own): own for own in (listed if isinstance(listed, list) else [listed])}
    tracking = (callbacks.get("RewardTracking") or {}).get("init_args") or {}
    facts = {
        "Objective": described(model.get("objective")),
        "Control words": control_words(model.get("objective")),
        "Reward": described(model.get("reward")),
        "Judge": described(tracking.get("judge")),
        "Model": described(model.get("policy")),
        "Optimizer": described(model.get("optimizer")),
        "Training prompts": brief(data.get("train")),
        "Evaluation prompts": brief(data.get("evaluation")),
    }
    return [(heading, words) for heading, words in facts.items() if words]


def described(part: Any) -> str:
    """A configured class in words: its name, and what in its settings is not the default."""
    if not class_of(part):
        return ""
    terms = (part.get("init_args") or {}).get("terms")
    if isinstance(terms, list):
        return " + ".join(f"{own.get('weight', 1)} x {described(own.get('reward'))}" for own in terms)
    told = [
        f"{own.name} {brief(own.value)}"
        for own in flat(part)
        if not (own.has_known_default and own.value == own.default) and "control_words" not in own.name
    ]
    return shortened(class_of(part) + (f" ({', '.join(told)})" if told else ""))


def control_words(part: Any) -> str:
    """The words that a configured objective steers by; empty where it has none."""
    if isinstance(part, Mapping):
        words = part.get("control_words")
        if isinstance(words, Mapping):
            ways = {"towards": words.get("positive"), "away from": words.get("negative")}
            return "; ".join(f"{way} {brief(own)}" for way, own in ways.items() if own)
        return next(filter(None, map(control_words, part.values())), "")
    return ""


def brief(value: Any) -> str:
    """A value on one short line."""
    if isinstance(value, list) and not is_part(value):
        return ", ".join(map(brief, value))
    return shortened("" if value is None else str(value))


def shortened(text: str) -> str:
    """A text of bounded length."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
