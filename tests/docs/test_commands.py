"""Every command of every page is read by the program's own parser, with the configuration that it names."""

import shutil
from pathlib import Path

import pytest

from srpo_lightning.cli import JOBS, main
from srpo_lightning.config.arguments import Parser
from srpo_lightning.config.names import COMMANDS
from srpo_lightning.trainer_cli import SRPOCLI
from tests.docs.snippets import PAGES, REPOSITORY, Command, blocks, commands

READ = "read to the end"
ANY_RECIPE = "configs/emoji_demo.yaml"
OURS = [command for page in PAGES for block in blocks(page) if block.kind == "shell" for command in commands(block)]
OURS = [command for command in OURS if command.ours]


class ReadToTheEnd(BaseException):
    """The parser has taken a command line, which would be run now."""


def end(*_):
    raise ReadToTheEnd


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkout in which a reader has begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Parser, "instantiate_classes", end)
    monkeypatch.setattr(SRPOCLI, "before_instantiate_classes", end)
    for name in ("configs", "examples", "experiments", "srpo_lightning"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def with_own_files(command: Command, folder: Path) -> None:
    """Write what a page has the reader write, and some recipe where its runs have written a configuration."""
    page = next(page for page in PAGES if page.name == command.block.page)
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
    for word in command.words:
        if word.endswith(".yaml") and not (path := folder / word).exists():
            assert word == "my.yaml" or word.startswith("runs/"), f"{command.block}: {word} is not there"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / ANY_RECIPE, path)


@pytest.mark.parametrize("command", OURS, ids=lambda command: f"{command.block}-{command.ours[0]}")
def test_a_command_is_taken_as_it_is(command, folder, monkeypatch, capsys):
    with_own_files(command, folder)
    for path in (str(folder), command.environment.get("PYTHONPATH")):
        if path:
            monkeypatch.syspath_prepend(path)
    shows = {"--help", "--print_config", "--version"} & set(command.ours)
    found = outcome(command.ours)
    assert found in ((0, None) if shows else (READ,)), f"{command.block}: {found}"
    assert not shows or capsys.readouterr().out


def outcome(words: list[str]) -> str | int | None:
    """How the program ends: READ, or with a status, or with what it refuses."""
    try:
        main(words)
    except ReadToTheEnd:
        return READ
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_typo_in_a_command_would_be_found(folder):
    words = ["fit", "--config", ANY_RECIPE]
    assert outcome(words) == READ
    assert "there is no such setting" in str(outcome([*words, "--model.policy.init_args.heigth", "64"]))


def test_pages_show_every_command():
    shown = {command.ours[0] for command in OURS}
    assert shown >= {*COMMANDS, *JOBS} - {"test"}, "each has its place in a page"
