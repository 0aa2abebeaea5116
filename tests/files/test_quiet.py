"""What libraries say of each other is left out, for a program of one's own too; nothing else changes."""

import subprocess
import sys
import warnings

from srpo_lightning.files.quiet import LOGS, QUIET, LeftOut

UNCHANGED = """
import logging, warnings
warnings.filterwarnings("error", "mine")
before, level = list(warnings.filters), logging.getLogger("torchao").level
import srpo_lightning
assert warnings.filters[: len(before)] == before
assert len(warnings.filters) > len(before)
assert logging.getLogger("torchao").level == level
srpo_lightning.quiet()
assert len(logging.getLogger("torchao").filters) == 1
warnings.warn("Found 3 module(s) in eval mode at the start of training.")
warnings.warn("a warning of one's own")
logging.basicConfig(format="%(message)s")
logging.getLogger("torchao").warning("Failed to load %s: no", "_C_mxfp8.so")
logging.getLogger("torchao").warning("another of torchao")
"""

LIBRARY = """
import srpo_lightning
from lightning.pytorch import Trainer
import srpo_lightning.callbacks, srpo_lightning.module, srpo_lightning.policies, srpo_lightning.rewards
import torchao, bitsandbytes
Trainer(logger=False, accelerator="cpu", devices=1, enable_checkpointing=False)
"""


def said(*arguments: str) -> str:
    """What a program prints as errors; one that fails raises."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_import_leaves_out_known_words_alone_and_changes_no_filter_or_level_of_ones_own():
    lines = said("-c", UNCHANGED)
    assert "a warning of one's own" in lines
    assert "another of torchao" in lines
    assert "eval mode" not in lines
    assert "mxfp8" not in lines


def test_who_asks_for_all_warnings_gets_them():
    program = 'import srpo_lightning, warnings; warnings.warn("Found 3 module(s) in eval mode")'
    assert "eval mode" in said("-W", "always", "-c", program)
    assert "eval mode" not in said("-c", program)


def test_a_program_of_ones_own_starts_without_advice_and_advertisement():
    assert set(said("-c", LIBRARY).splitlines()) <= {
        "GPU available: False, used: False",
        "TPU available: False, using: 0 TPU cores",
    }


def test_every_pattern_is_one():
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message)  # which compiles it
    assert all(LeftOut(pattern).name == pattern for pattern in LOGS.values())


def test_who_asks_the_command_line_for_all_warnings_gets_them():
    program = """
import warnings
from srpo_lightning.cli import as_program
with as_program():
    warnings.warn("Found 3 module(s) in eval mode")
"""
    assert "eval mode" in said("-W", "always:Found", "-c", program)
    assert "eval mode" not in said("-c", program)
