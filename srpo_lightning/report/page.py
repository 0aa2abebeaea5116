"""A page in one file: a template, its style and scripts, and what it shows as JSON in which no text is markup."""

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.records import Record
from srpo_lightning.files.strict_json import strict_json

ASSETS = Path(__file__).parent / "assets"
PLACE = re.compile(r"\{\{(\w+)\}\}")


def write_page(path: Path, title: str, script: str, content: Record, pictures: Mapping[str, Mapping[str, str]]) -> None:
    """Write a page, complete or absent.

    Args:
        path: File to write.
        title: Title of the page.
        script: Name of the script that shows the content.
        content: Everything that the page shows but pictures, as JSON takes it.
        pictures: Data URIs in blocks, each of which is read when it is first looked at.
    """
    text = page(title, script, content, pictures)
    with complete_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")


def page(title: str, script: str, content: Record, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """A page, as `write_page` writes it. Its policy lets a browser load nothing, and run its own script alone."""
    style = asset("page.css")
    code = "".join(asset(name) for name in ("page.js", "chart.js", script))
    blocks = [data(f'data-pictures="{html.escape(name)}"', own) for name, own in pictures.items()]
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(code)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "data": "\n".join([data('id="content"', content), *blocks]),
        "script": code,
    }
    return PLACE.sub(lambda found: parts[found[1]], asset("page.html"))  # once: what is put in is not looked at


def asset(name: str) -> str:
    """A part of every page."""
    return (ASSETS / name).read_text(encoding="utf-8")


def data(attribute: str, value: Record | Mapping[str, str]) -> str:
    """A value for the page's script, in which nothing can end the element or begin another."""
    text = strict_json(value)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" {attribute}>{text}</script>'


def digest(text: str) -> str:
    """What a content security policy knows an element's text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
