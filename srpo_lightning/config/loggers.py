"""Loggers that keep runs elsewhere: a run that is resumed goes on in the one that it began."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from srpo_lightning.files.checkpoints import complete_or_absent

WANDB = "WandbLogger"


def go_on_in_the_same(logger: Any, file: Path, *, is_resumed: bool) -> None:
    """Give Weights & Biases the run's own id, unless the configuration does.

    Args:
        logger: `trainer.logger` of a configuration: one, several, or a switch.
        file: File that keeps the id.
        is_resumed: Whether the run goes on; a new one gets a new id.
    """
    for own in _named(logger, WANDB):
        if own.get("id") is None and own.get("version") is None:
            if not (is_resumed and file.is_file()):
                with complete_or_absent(file) as partial:
                    partial.write_text(secrets.token_hex(4), encoding="ascii")
            own["id"] = file.read_text(encoding="ascii")
            own["resume"] = "allow"


def forget_own(logger: Any, file: Path) -> None:
    """Take the run's own id out of a configuration again: another run that is made from its record gets another.

    Args:
        logger: `trainer.logger` of the configuration.
        file: File that keeps the id.
    """
    for own in _named(logger, WANDB):
        if file.is_file() and own.get("id") == file.read_text(encoding="ascii"):
            own["id"] = None
            own.pop("resume", None)


def _named(logger: Any, name: str) -> Iterator[Namespace]:
    """The settings of loggers of a class."""
    for own in logger if isinstance(logger, list) else [logger]:
        if isinstance(own, Namespace) and str(own.get("class_path")).rpartition(".")[2] == name:
            yield own.init_args
