"""Tables and words of Markdown, in which text that others wrote is shown as it is, and does nothing."""

import re
from collections.abc import Iterable, Sequence

ACTIVE = re.compile(r"[\\`*\[\]~$|#]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown, with GitHub's and TensorBoard's additions, acts upon within a line; not `_` within a word."""

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Text that is Markdown already, written here."""

    __slots__ = ()


def escaped(text: object) -> Markdown:
    """Foreign text (a prompt, tag, label, name or path) for a heading, a cell or a sentence, on one line."""
    if isinstance(text, Markdown):
        return text
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return Markdown("".join(ENTITIES.get(letter, letter) for letter in ACTIVE.sub(r"\\\g<0>", line)))


def code(text: object) -> Markdown:
    """Foreign text as code, or as words, where it has letters that would end it."""
    line = str(text)
    return Markdown(f"`{line}`") if line.isprintable() and line.strip() and not set("`|") & set(line) else escaped(line)


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; what is no `Markdown` is escaped."""
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in map(escaped, cells))
