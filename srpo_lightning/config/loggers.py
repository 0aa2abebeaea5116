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
            own["id"] = _chosen(run, "wandb", "", is_resumed)
            own["resume"] = "allow"
    for own in _named(logger, "TrackioLogger"):
        if own.get("name") is None:
            own["name"] = _chosen(run, "trackio", f"{run.path.name}-", is_resumed)
            own["resume"] = "allow"
    for own in _named(logger, "MLFlowLogger"):
        if own.get("run_id") is None and is_resumed:
            own["run_id"] = _of_mlflow(own, run)


def forget_own(logger: Any, run: RunFolder) -> None:
    """Take the run's own ids out of a configuration again: another run that is made from its record gets others.

    Args:
        logger: `trainer.logger` of the configuration.
        run: Run folder, which keeps the ids.
    """
    for own in _named(logger, "WandbLogger"):
        if own.get("id") is not None and own.id == _kept(run, "wandb"):
            own["id"] = None
            own.pop("resume", None)
    for own in _named(logger, "TrackioLogger"):
        if own.get("name") is not None and own.name == _kept(run, "trackio"):
            own["name"], own["resume"] = None, "never"
    for own in _named(logger, "MLFlowLogger"):
        if own.get("run_id") is not None and own.run_id == _of_mlflow(own, run):
            own["run_id"] = None


def _kept(run: RunFolder, service: str) -> str | None:
    """What is kept of the run at a service; None where nothing is."""
    file = run.logged_id(service)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _chosen(run: RunFolder, service: str, prefix: str, is_resumed: bool) -> str:
    """The id of the run at a service, a new one for a new run."""
    known = _kept(run, service) if is_resumed else None
    if known is None:
        known = prefix + secrets.token_hex(4)
        with complete_or_absent(run.logged_id(service)) as partial:
            partial.write_text(known, encoding="utf-8")
    return known


def _of_mlflow(own: Namespace, run: RunFolder) -> str | None:
    """The id that MLflow gave the run, in the store of these settings of its logger; None where it is in none."""
    kept = json.loads(_kept(run, "mlflow") or "{}")
    is_same = kept.get("store") == (own.get("tracking_uri") or f"{FILES}{own.get('save_dir')}")
    return kept["id"] if is_same else None


def _named(logger: Any, name: str) -> Iterator[Namespace]:
    """The settings of loggers of a class."""
    for own in logger if isinstance(logger, list) else [logger]:
        if isinstance(own, Namespace) and str(own.get("class_path")).rpartition(".")[2] == name:
            yield own.init_args
