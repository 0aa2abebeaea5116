"""What was likely meant by a name that there is not."""

import difflib
import inspect
from collections.abc import Iterable, Set
from importlib import import_module

MODULES = (
    "srpo_lightning.policies",
    "srpo_lightning.rewards",
    "srpo_lightning.objectives",
    "srpo_lightning.callbacks",
    "srpo_lightning.training.strategies",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
)
"""Where the classes are that a configuration usually names."""

MOVED = {
    "srpo_lightning.checkpoints.": "srpo_lightning.files.checkpoints.",
    "srpo_lightning.strategies.": "srpo_lightning.training.strategies.",
    "srpo_lightning.low_bit.": "srpo_lightning.training.low_bit.",
}
"""Modules of classes that older configurations name, and where they lie now."""


GONE = {f"data.{name}": f"model.policy.init_args.{name}" for name in ("pretrained", "height", "width")}
"""Settings that older configurations have, and those that say it today."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the known name that is most like another; empty where none is."""
    lower = {other.lower(): other for other in known} | {o.rpartition(".")[2].lower(): o for o in known}
    for word, cutoff in ((name.lower(), 0.8), (name.rpartition(".")[2].lower(), 0.7)):
        if close := difflib.get_close_matches(word, lower, 1, cutoff):
            return f"; did you mean {lower[close[0]]}?"
    return ""


def nearest_setting(name: str, settings: Set[str]) -> str:
    """`; did you mean X?` with the setting that is most like a dotted name, of which any part may be wrong."""
    if name in GONE:
        return f"; it is {GONE[name]} alone now"
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        same_depth = [other for other in settings if other.count(".") == depth - 1]
        if close := difflib.get_close_matches(begin := ".".join(parts[:depth]), same_depth, 1, 0.8):
            return f"; did you mean {close[0]}?" if close[0] != begin else ""
    return nearest(parts[-1], sorted(settings))


def moved(class_path: str) -> str | None:
    """The class_path of today of a class that had another; None of any other text."""
    return next((new + class_path.removeprefix(old) for old, new in MOVED.items() if class_path.startswith(old)), None)


def class_names() -> list[str]:
    """The classes that a configuration usually names, by their class_path."""
    return [
        f"{module}.{name}"
        for module in MODULES
        for name, cls in vars(import_module(module)).items()
        if inspect.isclass(cls) and not name.startswith("_") and not inspect.isabstract(cls)
    ]


def settings_of(class_path: str) -> list[str]:
    """The names of a class's arguments."""
    module, _, name = class_path.rpartition(".")
    try:
        return [own for own in inspect.signature(getattr(import_module(module), name)).parameters if own != "params"]
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
