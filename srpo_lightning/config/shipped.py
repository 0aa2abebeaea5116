"""Names of what comes with the package: `recipe:` of configurations, `builtin:` of models and prompts."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from srpo_lightning.suggestions import nearest

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"
RECIPES = next((own for own in (PACKAGE / "configs", PACKAGE.parent / "configs") if own.is_dir()), PACKAGE)
"""In a wheel they lie in the package, in a checkout beside it."""

RECIPE, BUILTIN = "recipe:", "builtin:"
CONFIG = ("-c", "--config")


def recipes() -> list[str]:
    """The names of all recipes, those in folders with the folder's."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def with_recipes(words: Sequence[str]) -> list[str]:
    """A command line whose `--config recipe:NAME` are files.

    Raises:
        ValueError: naming the recipe and the nearest one.
    """
    return list(_with_recipes(words))


def _with_recipes(words: Sequence[str]) -> Iterator[str]:
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if equals and option in CONFIG and value.startswith(RECIPE):
            yield f"{option}={recipe_file(value)}"
        else:
            yield str(recipe_file(word)) if before in CONFIG and word.startswith(RECIPE) else word


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: Name of the recipe, with or without `recipe:` before it.

    Raises:
        ValueError: naming the recipe and the nearest one.
    """
    path = RECIPES / f"{name.removeprefix(RECIPE)}.yaml"
    if not path.is_file():
        has_prefix = name.startswith(RECIPE)
        known = [f"{RECIPE if has_prefix else ''}{own}" for own in recipes()]
        likely = nearest(name, known) or f"; there are {', '.join(known)}"
        raise ValueError(f"{name}: there is no such recipe{likely}")
    return path


def recipe_name(file: str) -> str:
    """A configuration file's name: `recipe:NAME` of one that comes with the package, its path of any other."""
    path = Path(file)
    return f"{RECIPE}{path.relative_to(RECIPES).with_suffix('').as_posix()}" if path.is_relative_to(RECIPES) else file


def with_builtin(value: Any, inner: Callable[[Any], Any] | None = None) -> Any:
    """Settings whose texts `builtin:NAME`, in lists and mappings too, are paths in the package.

    Args:
        value: Setting, or settings in their nesting.
        inner: Function that does the same to what a list or a mapping holds; None: this one.

    Raises:
        ValueError: naming what there is not, and the nearest that there is.
    """
    if isinstance(value, str):
        return _builtin(value) if value.startswith(BUILTIN) else value
    return _with_inner(value, inner or with_builtin)


def by_name(value: Any, inner: Callable[[Any], Any] | None = None) -> Any:
    """Settings as `with_builtin` found them: paths in the package, in lists and mappings too, are `builtin:NAME` again.

    What is written so is true on every machine.

    Args:
        value: Setting, or settings in their nesting.
        inner: Function that does the same to what a list or a mapping holds; None: this one.
    """
    if isinstance(value, str):
        own = value.removeprefix(f"{ASSETS}{os.sep}")
        return value if own == value else f"{BUILTIN}{own.replace(os.sep, '/')}"
    return _with_inner(value, inner or by_name)


def _with_inner(value: Any, inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {inner(key): inner(own) for key, own in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(inner(own) for own in value)
    return value


def _builtin(name: str) -> str:
    path = ASSETS / name.removeprefix(BUILTIN)
    if not path.exists():
        folders = [own.name for own in ASSETS.iterdir() if own.is_dir() and own.name != "prompts"]
        files = [f"prompts/{own.name}" for own in (ASSETS / "prompts").iterdir()]
        known = [f"{BUILTIN}{own}" for own in sorted([*folders, *files])]
        raise ValueError(f"{name}: nothing of that name comes with the package{nearest(name, known) or ''}")
    return str(path)
