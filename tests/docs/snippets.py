"""The code blocks of all pages, each with its kind; and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).parents[2]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *DOCS]

DIRECTIVES = frozenset({"{toctree}", "{glossary}", "{include}"})
KINDS = frozenset({"shell", "python", "yaml", "text"}) | DIRECTIVES
"""All that a block may be; `text` is shown and not run: outputs, trees, files of prompts."""

PROGRAMS = frozenset({
    "python", "srpo", "make", "python3", "pip", "pytest", "pre-commit", "tensorboard", "jupyter", "hf", "sbatch",
    "torchrun", "export", ".",
})  # fmt: skip
"""First words of commands; a block that is indented is known by them."""

ASSIGNED = re.compile(r"([A-Z_]+)=(\S*)")


class Block(NamedTuple):
    """A code block of a page.

    Args:
        page: Name of its file.
        line: Number of its first line.
        kind: One of KINDS; anything else is a mistake.
        text: The code.
        file: Name of the file that a reader is to write, which stands behind the kind; empty where there is none.
    """

    page: str
    line: int
    kind: str
    text: str
    file: str

    def __str__(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """One command of a block.

    Args:
        block: Block that holds it.
        environment: Variables set in front of it.
        words: Program and arguments.
    """

    block: Block
    environment: dict[str, str]
    words: list[str]

    @property
    def ours(self) -> list[str] | None:
        """What stands behind the name of this project's program; None for another one's."""
        if self.words[0] == "srpo":
            return self.words[1:]
        if self.words[0] in ("python", "torchrun") and "srpo_lightning" in self.words:
            return self.words[self.words.index("srpo_lightning") + 1 :]
        return None


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page."""
    found = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            kind, _, file = token.info.partition(" ") if token.type == "fence" else (guess(token.content), "", "")
            own = "" if kind in DIRECTIVES else file
            found.append(Block(page.name, token.map[0] + 1, kind, token.content, own))
    return found


def guess(text: str) -> str:
    """The kind of an indented block, which does not say it."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "#"))]
    first = lines[0].split()[0] if lines else ""
    if first in PROGRAMS or ASSIGNED.match(first):
        return "shell"
    if first in ("class", "from", "import", "def"):
        return "python"
    try:
        return "yaml" if isinstance(yaml.safe_load(text), dict) else "unknown"
    except yaml.YAMLError:
        return "unknown"


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block, one after the other, with variables put in."""
    variables: dict[str, str] = {}
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", line):
            for name, value in variables.items():
                part = part.replace(f"${name}", value)
            words = shlex.split(part, comments=True)
            own: dict[str, str] = {}
            while words and (found := ASSIGNED.fullmatch(words[0])):
                own[found[1]], words = found[2], words[1:]
            if words:
                yield Command(block, own, words)
            else:
                variables |= own
