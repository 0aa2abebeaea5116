"""What pages list of the code leaves nothing out, and says something of everything."""

import re
import sys
from importlib import import_module
from inspect import signature

import pytest

from srpo_lightning.cli import JOBS, PLAIN
from srpo_lightning.config.names import COMMANDS, known_names
from srpo_lightning.evaluation.meanings import MEANINGS
from tests.docs.snippets import REPOSITORY

SET_BY_LINKS = {"data.encoder", "data.repeats", "data.seed", "model.seed"}


@pytest.fixture(scope="module")
def listings():
    sys.path.insert(0, str(REPOSITORY / "docs"))
    try:
        yield import_module("listings")
    finally:
        sys.path.remove(str(REPOSITORY / "docs"))


def test_every_command_is_listed_with_every_argument(listings):
    parts = dict(re.findall(r"(?ms)^## (\S+)\n(.*?)(?=^## |\Z)", listings.commands()))
    assert set(parts) == {*COMMANDS, *JOBS}
    for command, module in JOBS.items():
        for name in signature(getattr(import_module(module), command.replace("-", "_"))).parameters:
            term = f"`{PLAIN[name][1]} ...`" if name in PLAIN else f"`--{name}`"
            assert term in parts[command], (command, name)


def test_every_key_of_a_configuration_is_listed_and_none_that_links_set(listings):
    listed = set(re.findall(r"(?m)^`([\w.]+)` ", listings.configuration()))
    keys = {name for name in known_names("fit") if "." in name}
    assert keys - SET_BY_LINKS - listed == set()
    assert not listed & SET_BY_LINKS
    assert {"seed_everything", "memory_check"} <= listed


def test_every_number_is_listed(listings):
    assert all(f"`{name}`\n" in listings.metrics() for name in MEANINGS)


def test_nothing_is_listed_without_a_word_of_what_it_is(listings):
    for name, listing in listings.LISTINGS.items():
        assert not re.findall(r"(?m)^`[^\n]*\n: *$", listing()), name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (":class:`~a.b.Trainer` has <x>", r"`Trainer` has \<x>"),
        ("``2 * 3`` and a*b", r"`2 * 3` and a\*b"),
        ("Number of nodes. Default: ``1``.", "Number of nodes."),
    ],
)
def test_help_texts_become_markdown(listings, text, shown):
    assert listings.plain(text) == shown
