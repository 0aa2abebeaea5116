"""Sphinx makes pages of docs/*.md and of the notebooks: `make docs`."""

import re
import shutil
import sys
from importlib import import_module
from inspect import Signature, isabstract, signature
from pathlib import Path
from typing import Any

from srpo_lightning import __version__

project = "SRPO-Lightning"
copyright = "the authors of SRPO-Lightning"  # Sphinx' name
release = __version__
sys.path.insert(0, str(Path(__file__).parent))  # for listings.py
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # their outputs are kept in them
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
smartquotes = False  # which makes dashes of options
autodoc_typehints = "none"
default_role = "code"
napoleon_include_init_with_doc = False

REPOSITORY = Path(__file__).parents[1]
COPIES = Path(__file__).parent / "notebooks"
shutil.rmtree(COPIES, ignore_errors=True)
shutil.copytree(
    REPOSITORY / "notebooks", COPIES, ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")]
)
LISTED = re.compile(r"^@(commands|configuration|metrics)\b.*$", re.MULTILINE)
CLASSES = re.compile(r"^@classes (\S+).*$", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def without_links_out(_app: Any, _page: str, source: list[str]) -> None:
    """Name what lies outside docs/ instead of linking to it, where it is no single file that a page can hold."""

    def named(found: re.Match[str]) -> str:
        text, path = found[1], found[2]
        is_page = path.endswith(".md") or (REPOSITORY / path).is_dir()
        return found[0] if not is_page else text if path.startswith(text.rstrip("/")) else f"{text} (`{path}`)"

    source[0] = OUTSIDE.sub(named, source[0].replace("](../notebooks/", "](notebooks/"))


def with_classes(_app: Any, _page: str, source: list[str]) -> None:
    """Put the classes of a package, with their settings, in the place of a line `@classes package`."""

    def listed(found: re.Match[str]) -> str:
        package = import_module(found[1])
        own = {name: value for name, value in vars(package).items() if not name.startswith("_")}
        names = [name for name, value in own.items() if isinstance(value, type) and is_named(value, found[1])]
        directives = "\n\n".join(f".. autoclass:: {found[1]}.{name}" for name in names)
        return f"```{{eval-rst}}\n{directives}\n```"

    source[0] = CLASSES.sub(listed, source[0])


def with_listings(_app: Any, _page: str, source: list[str]) -> None:
    """Put the commands, the keys of a configuration or the numbers of a run in the place of a line `@commands`."""
    if LISTED.search(source[0]):
        from listings import LISTINGS  # imports of seconds, for three pages

        source[0] = LISTED.sub(lambda found: LISTINGS[found[1]](), source[0])


def is_named(cls: type, package: str) -> bool:
    """Whether a class of a package is one that a configuration can name by its `class_path`."""
    return cls.__module__.startswith(package) and not isabstract(cls) and not issubclass(cls, tuple)


def own_signature(_app: Any, _what: str, _name: str, value: Any, *_: Any) -> tuple[str, str] | None:
    """A class's own settings with their defaults; a base class's `__new__`, which takes anything, would hide them."""
    if not isinstance(value, type):
        return None
    settings = [own.replace(annotation=own.empty) for own in signature(value.__init__).parameters.values()]
    return str(Signature(settings[1:])), ""


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", own_signature)
    app.connect("source-read", without_links_out)
    app.connect("source-read", with_classes)
    app.connect("source-read", with_listings)
