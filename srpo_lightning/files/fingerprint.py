"""What numbers and pictures depend on, as a hash: what objects were made of, and what is in the files they name."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.constants import HF_HUB_CACHE

SAMPLED_BYTES = 1 << 20
MADE_OF = "_made_of"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Recorded:
    """Remembers what its constructor was called with, a subclass's own included."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Arguments that no number depends on, such as a folder for what is made anew where it is not there."""

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
        made_of = {name: own for name, own in arguments(value).items() if name not in value.without_effect}
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

    What it hands on to its base as `*args` and `**kwargs` counts under the names that it has there.
    """
    args, kwargs = value.__dict__[MADE_OF]
    own, *above = _constructors(type(value))
    bound = own.bind(value, *args, **kwargs)
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])
    for parameter in own.parameters.values():
        if above and parameter.kind is parameter.VAR_POSITIONAL:
            named |= zip(list(above[0].parameters)[1:], named.pop(parameter.name), strict=False)
        elif above and parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name)
    of_bases = [parameter for base in reversed(above) for parameter in base.parameters.values()]
    defaults = {parameter.name: parameter.default for parameter in of_bases if parameter.default is not parameter.empty}
    return defaults | named


def _constructors(cls: type) -> list[inspect.Signature]:
    """A class's constructor, and those of its bases, as far as each hands keywords on to the next."""
    found = [inspect.signature(vars(own)["__init__"]) for own in cls.__mro__ if "__init__" in vars(own)]
    for number, constructor in enumerate(found):
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in constructor.parameters.values()):
            return found[: number + 1]
    return found


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
