"""Classes that a configuration names by their class_path, compared as classes and not by their names."""

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace


def is_class(class_path: str, kind: type) -> bool:
    """Whether a class_path names a class, or one derived from it.

    Args:
        class_path: Path of a class that can be imported, as `package.module.Class`.
        kind: Class to compare with.
    """
    found = resolve_name(class_path)
    return isinstance(found, type) and issubclass(found, kind)


def of_class(chosen: Iterable[Namespace] | None, kind: type) -> list[Any]:
    """Those of a list of configured classes that are of a class, as their settings stand; none of null."""
    return [own for own in chosen or () if is_class(own.class_path, kind)]
