"""Loggers that keep runs elsewhere: a run that is resumed goes on in the one that it began."""

import json
import secrets
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.run_folder import RunFolder

FILES = "file:"
"""How Lightning's MLFlowLogger begins the address of a store that is a folder."""


def go_on_in_the_same(logger: Any, run: RunFolder, *, is_resumed: bool) -> None:
    """Give loggers the run's own id or name, unless the configuration does.

    Weights & Biases and trackio take one of ours. MLflow chooses itself, and RunSettings keeps what it chose.

    Args:
        logger: `trainer.logger` of a configuration: one, several, or a switch.
        run: Run folder, which keeps the ids.
        is_resumed: Whether the run goes on; a new one gets new ids.
    """
    for own in _named(logger, "WandbLogger"):
        if own.get("id") is None and own.get("version") is None:
            own["id"] = _kept(run, "wandb", "", is_resumed)
            own["resume"] = "allow"
    for own in _named(logger, "TrackioLogger"):
        if own.get("name") is None:
            own["name"] = _kept(run, "trackio", f"{run.path.name}-", is_resumed)
            own["resume"] = "allow"
    file = run.logged_id("mlflow")
    for own in _named(logger, "MLFlowLogger"):
        if own.get("run_id") is None and is_resumed and file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            is_same = kept["store"] == (own.get("tracking_uri") or f"{FILES}{own.get('save_dir')}")
            own["run_id"] = kept["id"] if is_same else None


def _kept(run: RunFolder, service: str, prefix: str, is_resumed: bool) -> str:
    """The id of the run at a service, a new one for a new run."""
    file = run.logged_id(service)
    if not (is_resumed and file.is_file()):
        with complete_or_absent(file) as partial:
            partial.write_text(prefix + secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _named(logger: Any, name: str) -> Iterator[Namespace]:
    """The settings of loggers of a class."""
    for own in logger if isinstance(logger, list) else [logger]:
        if isinstance(own, Namespace) and str(own.get("class_path")).rpartition(".")[2] == name:
            yield own.init_args
