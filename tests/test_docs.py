"""Pages point at what is there, and their commands at settings that are read."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from srpo_lightning.cli import JOBS
from srpo_lightning.config.names import COMMANDS

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
COMMAND = re.compile(r"python -m srpo_lightning ((?:\\\n|[^\n#`])+)")


def slug(heading: str) -> str:
    """As GitHub makes anchors."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"(?m)^#+ (.+)$", file.read_text())
                assert anchor in map(slug, headings), target


def test_commands_in_the_middle_of_a_sentence_are_there_too():
    """Those that stand alone are read by the program itself, in tests/docs."""
    found = 0
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):  # which names what is gone
        for command in COMMAND.findall(page.read_text()):
            words = shlex.split(command.replace("\\\n", " "))
            assert words[0] in {*COMMANDS, *JOBS, "COMMAND", "--help"}, command
            files = [value for word, value in pairwise(words) if word == "--config" and value.startswith("configs/")]
            assert all((REPOSITORY / file).is_file() for file in files), command
            found += 1
    assert found > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_word_in_angle_brackets_is_taken_for_markup_and_lost(page):
    text = re.sub(r"(?ms)^```.*?^```|^    .*?$|`[^`]*`", "", page.read_text())
    assert not re.findall(
        r"<(?!(?:https?|mailto):|/?(?:a|img|br|p|picture|source|sub|sup|details|summary)\b)[A-Za-z/]", text
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_taken_for_a_comment_and_lost(page):
    """One that begins with a percent sign, to MyST."""
    assert not re.findall(r"(?m)^ *%.*", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_place_is_left_to_be_filled_in(page):
    """But those that the documentation's build fills in."""
    assert not re.findall(r"(?m)^@(?!(?:commands|configuration|metrics|classes)\b).*", page.read_text())
