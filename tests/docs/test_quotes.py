"""What pages quote of the program's messages, the program says."""

import ast
import re

import pytest

from tests.docs.snippets import DOCS, REPOSITORY

ROWS = re.compile(r"(?m)^\| ([^|]*) \|.*\|$")
QUOTES = [
    (page.name, quote)
    for page in DOCS
    if page.stem == "troubleshooting" or page.stem.startswith(("start_", "over_"))
    for row in ROWS.findall(page.read_text())
    for quote in re.findall(r'"([^"]+)"', row)
]
GUARDED = [
    ("over_optimisation.md", quote)
    for quote in (
        "the held-out score fell by ... while the training reward rose",
        "diversity is ..., the base's is ...",
        "drift from the base is ...",
    )
]


def literals() -> list[str]:
    """Every text in the package; a null character stands for what is put in."""
    found = []
    for path in (REPOSITORY / "srpo_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                values = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = "\n".join(literals())


@pytest.mark.parametrize(("page", "quote"), [*QUOTES, *GUARDED], ids=lambda value: value[:40])
def test_a_quoted_message_is_one_of_the_programs(page, quote):
    pieces = [re.escape(piece.strip(" ,.")) for piece in quote.split("...")]
    assert re.search("[^\n]*?".join(filter(None, pieces)), TEXTS), f"{page}: nothing says {quote!r}"


def test_quotes_are_found():
    assert len(QUOTES) > 40
    assert not re.search(re.escape("there is no such mistake"), TEXTS)
