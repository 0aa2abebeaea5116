"""What the page about several runs shows: the same numbers, prompts and settings beside each other."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srpo_lightning.evaluation.comparison import BASE, LABEL, NOT_WON
from srpo_lightning.evaluation.metrics import Table, bootstrap_mean
from srpo_lightning.evaluation.pictures import DRAWN_FROM
from srpo_lightning.files import records
from srpo_lightning.files.provenance import software
from srpo_lightning.files.records import Record
from srpo_lightning.picture_statistics import STATISTICS
from srpo_lightning.report import curves, samples
from srpo_lightning.report.configuration import OF_ONE_START, asked_for, class_of, defaults_of, flat, read_configuration
from srpo_lightning.report.page import write_page
from srpo_lightning.report.samples import Logged
from srpo_lightning.report.thumbnails import Thumbnails
from srpo_lightning.run_folder import RunFolder

READ_BY_SCORE = {"Plain": ("template",), "Relative": ("control_words", "template")}
"""Settings by which a form scores finished pictures; its others are for training alone."""


class Run(NamedTuple):
    """What a page needs of one run.

    Args:
        name: Name that tells it from the others.
        folder: Folder of the run.
        metrics: Numbers of its evaluations, by their step.
        metadata: Records of its pictures.
        tables: Numbers of every sample of its last evaluation, by the weights.
        prompts: Its evaluation prompts by their number, as far as they are known.
        settings: Its configuration.
    """

    name: str
    folder: RunFolder
    metrics: list[Record]
    metadata: list[Record]
    tables: dict[str, Table]
    prompts: dict[int, str]
    settings: dict[str, Any]


def write_comparison_page(path: Path, folders: Sequence[Path]) -> None:
    """Write a page about several runs.

    Args:
        path: File to write.
        folders: Folders of the runs; differences are from the first.

    Raises:
        ValueError: naming the file, if a record cannot be read, or a folder holds no evaluations.
    """
    runs = [read_run(name, RunFolder(folder)) for name, folder in zip(names_of(folders), folders, strict=True)]
    kinds = [kind for kind in ("policy", "ema") if all(kind in run.tables for run in runs)] or ["policy"]
    logged = [Logged(run.folder, run.metadata) for run in runs]
    most = min(own.most_pictures for own in logged)
    prompts = shared_prompts(logged, most // (1 + len(runs) * len(kinds)))
    found = [curves.evaluation_curves(run.metrics) for run in runs]
    names = curves.in_order(name for own in found for name in own)
    content = {
        "name": f"{len(runs)} runs",
        "runs": [run.name for run in runs],
        "asked": [dict(asked_for(run.settings)) for run in runs],
        "kinds": kinds,
        "charts": [chart(name, runs, found, kind) for kind in kinds for name in names],
        "last": {kind: list(last_values(runs, kind)) for kind in kinds},
        "prompts": prompts,
        "settings": differing(runs),
        "meanings": curves.meanings(names),
        "notes": notes(runs),
        "written": f"{time.strftime('%Y-%m-%d %H:%M %Z')} by {software()}",
    }
    write_page(path, "Runs compared", "comparison.js", content, pictures(logged, prompts, kinds))


def read_run(name: str, folder: RunFolder) -> Run:
    """What a page needs of one run."""
    folder.check_evaluated()
    metrics = curves.by_step(folder.read_metrics())
    metadata = records.read(folder.samples.metadata)
    _, tables = samples.last_tables(folder, metrics)
    prompts = samples.prompts_by_group(folder, tables, metadata)
    return Run(name, folder, metrics, metadata, tables, prompts, read_configuration(folder)[1])


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError("a run is named twice: name each once")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def chart(name: str, runs: Sequence[Run], found: Sequence[Mapping[str, Any]], kind: str) -> Record:
    """One number of all runs over their steps."""
    series = [
        {"name": run.name, "points": own[name][kind]}
        for run, own in zip(runs, found, strict=True)
        if kind in own.get(name, {})
    ]
    return {"name": name, "group": curves.group_of(name), "kind": kind, "series": series}


def last_values(runs: Sequence[Run], kind: str) -> Iterator[Record]:
    """A row for each number of the runs' last evaluations, with what is between them and the first run."""
    last = [next((own for own in reversed(run.metrics) if own.get("weights") == kind), {}) for run in runs]
    reasons = [None, *(why_not_paired(runs[0], run, kind) for run in runs[1:])]
    for name in curves.in_order(name for own in last for name in own if name not in ("step", "weights", "key")):
        cells = []
        for run, record, reason in zip(runs, last, reasons, strict=True):
            cell: Record = {"value": record.get(name), "half": None, "difference": None, "low": None, "high": None}
            column = run.tables[kind].columns.get(name) if kind in run.tables and name != LABEL else None
            if column is not None:
                mean = bootstrap_mean(column, run.tables[kind].groups)
                cell["half"] = mean.half
            is_same = definition(runs[0].settings, name) == definition(run.settings, name)
            if run is not runs[0] and is_same:
                cell |= difference(runs[0], run, kind, name, reason) or plain_difference(last[0], record, name)
            cell["is_same"] = is_same
            cells.append(cell)
        yield {"name": name, "is_better_up": name not in NOT_WON, "cells": cells}


def difference(first: Run, run: Run, kind: str, name: str, reason: str | None) -> Record | None:
    """The mean difference of a score from the first run's on the same samples, with its interval over prompts."""
    if reason is not None or name not in run.tables[kind].columns or name not in first.tables[kind].columns:
        return None
    ours, theirs = run.tables[kind], first.tables[kind]
    found = bootstrap_mean(ours.columns[name] - theirs.columns[name], ours.groups)
    return {"difference": found.value, "low": found.low, "high": found.high}


def plain_difference(first: Record, record: Record, name: str) -> Record:
    """The difference of two numbers, of which no interval is known."""
    known = isinstance(first.get(name), int | float) and isinstance(record.get(name), int | float)
    return {"difference": record[name] - first[name]} if known else {}


def why_not_paired(first: Run, run: Run, kind: str) -> str | None:
    """Why the samples of two runs are not of the same prompts and noise; None where they are, as far as is recorded."""
    if kind not in run.tables or kind not in first.tables:
        return "a table is missing"
    if not torch.equal(first.tables[kind].indices, run.tables[kind].indices):
        return "other numbers of samples"
    shared = first.prompts.keys() & run.prompts.keys()
    if any(first.prompts[group] != run.prompts[group] for group in shared):
        return "other prompts"
    drawn = {own["index"]: own for own in first.metadata if "index" in own}
    for own in run.metadata:
        before = drawn.get(own.get("index"))
        if before is not None and any(before.get(key) != own.get(key) for key in DRAWN_FROM):
            return "other noise, guidance or numbers of steps"
    return None


def notes(runs: Sequence[Run]) -> list[str]:
    """What keeps runs from being compared sample by sample."""
    reasons = {run.name: why_not_paired(runs[0], run, "policy") for run in runs[1:]}
    return [
        f"{name} is not compared sample by sample with {runs[0].name}: {reason}. Its differences have no intervals."
        for name, reason in reasons.items()
        if reason
    ]


def definition(settings: Mapping[str, Any], name: str) -> Any:
    """What a number is measured by, from a configuration: where it differs, numbers of one name do not compare."""
    model, trainer = settings.get("model") or {}, settings.get("trainer") or {}
    listed = trainer.get("callbacks") or []
    tracking = next((own.get("init_args") or {} for own in listed if class_of(own) == "RewardTracking"), {})
    form = form_of(tracking, (model.get("objective") or {}).get("init_args") or {})
    name = name.removeprefix("win/")
    if name in STATISTICS:
        return None
    if name == "reward":
        return [model.get("reward"), form]
    if name == "judge":
        return [tracking.get("judge"), form]
    if name == "held_out":
        return [tracking.get("judge"), form, tracking.get("held_out"), tracking.get("metrics")]
    own = (tracking.get("metrics") or {}).get(name)
    return own if own else [tracking.get(key) for key in ("judge", "labels", "candidates")]


def form_of(tracking: Mapping[str, Any], objective: Mapping[str, Any]) -> list[Any]:
    """The form of the reward by which finished pictures are scored: its class, and what its score reads.

    SRPO has a Relative's words itself. An objective with neither words nor a form asks for the plain reward.

    Args:
        tracking: Settings of RewardTracking, whose form comes first.
        objective: Settings of the objective.
    """
    own = {"class_path": f"srpo_lightning.objectives.{'Relative' if 'control_words' in objective else 'Plain'}"}
    form = tracking.get("form") or objective.get("form") or {**own, "init_args": objective}
    settings = defaults_of(form["class_path"]) | (form.get("init_args") or {})
    return [class_of(form), {name: settings.get(name) for name in READ_BY_SCORE.get(class_of(form), settings)}]


def shared_prompts(logged: Sequence[Logged], most: int) -> list[Record]:
    """The samples whose prompt and noise all runs have logged pictures of."""
    found = []
    for index in logged[0].indices:
        if all(index in own.indices for own in logged):
            drawn = [[own.record_of(index).get(key) for key in ("prompt", "seed")] for own in logged]
            if all(own == drawn[0] for own in drawn):
                found.append({"index": index, "prompt": str(drawn[0][0])})
    return found[:most]


def pictures(logged: Sequence[Logged], prompts: Sequence[Record], kinds: Sequence[str]) -> dict[str, dict[str, str]]:
    """The pictures as data URIs: a block for the base of the first run, and one for each run and its weights."""
    thumbnails = Thumbnails()
    first = logged[0]
    bases = {own["index"]: first.bases[own["index"]] for own in prompts if own["index"] in first.bases}
    blocks = {BASE: {str(i): thumbnails.url(first.run.samples.picture(*key)) for i, key in bases.items()}}
    for number, own in enumerate(logged):
        for kind in kinds:
            block = {}
            for prompt in prompts:
                steps = [step for step, weights, i in own.records if weights == kind and i == prompt["index"] and step]
                if steps:
                    path = own.run.samples.picture(max(steps), kind, prompt["index"])
                    block[str(prompt["index"])] = thumbnails.url(path)
            blocks[f"{number}/{kind}"] = block
    return blocks


def differing(runs: Sequence[Run]) -> list[Record]:
    """The settings that are not the same in all runs."""
    found = [{own.name: own.value for own in flat(run.settings) if own.name not in OF_ONE_START} for run in runs]
    names = dict.fromkeys(name for own in found for name in own)
    rows = [{"name": name, "values": [own.get(name) for own in found]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]
