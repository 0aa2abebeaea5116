"""Values that the types of settings let pass: numbers that are none or have no end, null where it means nothing."""

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, get_args, get_type_hints


def check_values(settings: Mapping[str, Any], owners: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse NaN, infinity and null.

    Args:
        settings: Settings as nested mappings and lists, with `class_path` and `init_args` where a class is named.
        owners: Classes whose arguments a group of settings holds without a class_path, by the group's name.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in _numbers("", settings):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: expected a finite number")
    for name, own in owners.items():
        if isinstance(settings.get(name), Mapping):
            _check_null(name, settings[name], own)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from _numbers(f"{name}.{key}" if name else str(key), own)
    elif isinstance(value, list | tuple):
        for number, own in enumerate(value):
            yield from _numbers(f"{name}[{number}]", own)


def _check_null(name: str, settings: Mapping[str, Any], owner: Callable[..., Any]) -> None:
    """`jsonargparse` takes null for an argument that was not given; its default is not put in its place."""
    parameters: Mapping[str, Parameter]
    try:
        parameters = signature(owner).parameters
        hints = get_type_hints(owner.__init__ if isinstance(owner, type) else owner)  # type: ignore[misc]
    except (NameError, TypeError, ValueError):  # a library's own, whose annotations cannot be read
        parameters, hints = {}, {}
    for key, value in settings.items():
        if value is None and key in hints and hints[key] is not Any and type(None) not in get_args(hints[key]):
            default = parameters[key].default
            if default is Parameter.empty:
                raise ValueError(f"{name}.{key} is missing: {getattr(owner, '__name__', owner)} needs it")
            if default is not None:
                raise ValueError(f"{name}.{key} is null, which means nothing there: leave it out ({default!r} then)")
        _check_class(f"{name}.{key}", value)


def _check_class(name: str, value: Any) -> None:
    if isinstance(value, list):
        for number, own in enumerate(value):
            _check_class(f"{name}[{number}]", own)
    elif isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        module, _, cls = value["class_path"].rpartition(".")
        found = getattr(import_module(module), cls, None) if module else None
        if callable(found) and isinstance(value.get("init_args"), Mapping):
            _check_null(f"{name}.init_args", value["init_args"], found)
    elif isinstance(value, Mapping):
        for key, own in value.items():
            _check_class(f"{name}.{key}", own)
