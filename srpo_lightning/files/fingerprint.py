"""What numbers and pictures depend on, as a hash: what objects were made of, and what is in the files they name."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

SAMPLED_BYTES = 1 << 20
MADE_OF = "_made_of"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Recorded:
    """Remembers what its constructor was called with, a subclass's own included."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Before any constructor runs, so that none has to know."""
        self = super().__new__(cls)
        self.__dict__[MADE_OF] = args, kwargs
        return self


def fingerprint(value: Any) -> str:
    """A hash that two values share if they were made of the same, defaults spelled out or not, in whatever order."""
    return hashlib.sha256(json.dumps(described(value), sort_keys=True).encode()).hexdigest()


def described(value: Any) -> Any:
    """A value as JSON: classes with what they were made of, files by their content, hub models by their revision."""
    made_of: Mapping[str, Any] | None = None
    if isinstance(value, Recorded):
        made_of = arguments(value)
    elif is_dataclass(value) and not isinstance(value, type):
        made_of = {own.name: getattr(value, own.name) for own in fields(value)}
    if made_of is not None:
        return [_name(type(value)), {name: _content_or_description(own) for name, own in made_of.items()}]
    if isinstance(value, Mapping):
        return {str(key): described(own) for key, own in value.items()}
    if isinstance(value, Set):
        return sorted((described(own) for own in value), key=json.dumps)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [described(own) for own in value]
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(numbers).hexdigest()]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 is 1.0 wherever a number is asked for
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    return [_name(type(value)), described(vars(value)) if hasattr(value, "__dict__") else repr(value)]


def arguments(value: Recorded) -> dict[str, Any]:
    """What a constructor was called with, by the names of its parameters, defaults included.

    What it hands on to its base as `**kwargs` counts under the names that it has there.
    """
    args, kwargs = value.__dict__[MADE_OF]
    bound = inspect.signature(type(value).__init__).bind(value, *args, **kwargs)
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])
    defaults = _defaults_of_bases(type(value))
    handed_on = named.pop("kwargs") if defaults else {}
    return defaults | named | handed_on


def _defaults_of_bases(cls: type) -> dict[str, Any]:
    """The defaults that a constructor leaves to those of its bases by a parameter called `**kwargs`."""
    constructors = [inspect.signature(vars(own)["__init__"]) for own in cls.__mro__ if "__init__" in vars(own)]
    defaults: dict[str, Any] = {}
    for constructor, base in pairwise(constructors):
        if "kwargs" not in constructor.parameters:
            break
        defaults = {p.name: p.default for p in base.parameters.values() if p.default is not p.empty} | defaults
    return defaults


def content_of(path: Path) -> str:
    """A hash of a file, or of a folder's files and those of the folders in it: names, sizes, first and last MiB."""
    files = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("*/*")])
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path.parent if path.is_file() else path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(json.dumps([name.as_posix(), file.stat().st_size]).encode())
            digest.update(ends(file))
    return digest.hexdigest()


def ends(file: Path) -> bytes:
    """A file's first and last MiB, which retraining or another precision changes."""
    with file.open("rb") as stream:
        first = stream.read(SAMPLED_BYTES)
        stream.seek(max(file.stat().st_size - SAMPLED_BYTES, 0))
        return first + stream.read(SAMPLED_BYTES)


def _content_or_description(value: Any) -> Any:
    """What a constructor's argument names, if that is a file, a folder or a model of the hub that was fetched."""
    if not isinstance(value, str | Path):
        return described(value)
    if _is_there(value):
        return {"content": content_of(Path(value).expanduser())}
    if HUB_ID.fullmatch(str(value)):
        revision = Path(HF_HUB_CACHE) / "--".join(["models", *str(value).split("/")]) / "refs" / "main"
        if _is_there(revision):
            return {"hub": str(value), "revision": revision.read_text().strip()}
    return str(value)


def _is_there(path: str | Path) -> bool:
    try:
        return bool(str(path)) and Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a name, or of an unknown user's home
        return False


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
