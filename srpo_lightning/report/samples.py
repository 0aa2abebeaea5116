"""Samples of a run: every measured one beside the base's from the same noise, and the logged pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srpo_lightning.evaluation.comparison import BASE, HELD_OUT, are_paired, compare, won
from srpo_lightning.evaluation.metrics import Table
from srpo_lightning.files.records import Record
from srpo_lightning.report.thumbnails import CLIP_SHARE, MAX_PICTURES, MAX_PROMPTS, Thumbnails, thinned
from srpo_lightning.run_folder import RunFolder

MAX_SAMPLES = 2000
"""Number of samples in the list of those won and lost at most: the worst and the best by the first score."""

DIGITS = 5


def last_tables(run: RunFolder, metrics: Sequence[Record]) -> tuple[int, dict[str, Table]]:
    """The step of the last evaluation whose tables are there, and the tables, the base's first.

    Raises:
        ValueError: naming the file, if one is damaged.
    """
    for step in sorted({own["step"] for own in metrics}, reverse=True):
        measured = [own for own in metrics if own["step"] == step and "weights" in own]
        kinds = dict.fromkeys(str(own["weights"]) for own in measured)
        found = {kind: table for kind in kinds if (table := run.read_table(step, kind)) is not None}
        if found:
            base = run.read_base(measured[-1].get("key"))  # `validate` may have measured with other settings since
            return step, ({BASE: base} if base is not None and step else {}) | found
    base = run.read_base()
    return 0, {BASE: base} if base is not None else {}


def last_values(metrics: Sequence[Record], tables: Mapping[str, Table]) -> list[Record]:
    """The rows of the table of last values: of each number what base, policy and ema have, with intervals."""
    latest = {str(own["weights"]): own for own in metrics if own["step"] and "weights" in own}
    first = [own for own in metrics if not own["step"]]
    measured = compare(tables)["all"] if tables else {}
    base = first[0] if first else {name: own.mean.value for name, own in measured.get(BASE, {}).items()}
    records = ({BASE: base} if base else {}) | latest
    names = dict.fromkeys(name for own in records.values() for name in own if name not in ("step", "weights", "key"))
    rows = []
    for name in names:
        if name.startswith("win/"):
            continue  # it stands beside its score
        cells: Record = {}
        for kind, record in records.items():
            measure = measured.get(kind, {}).get(name)
            win = measure.win if measure is not None and kind != BASE else None
            cells[kind] = {
                "value": record.get(name),
                "half": measure.mean.half if measure is not None and measure.mean.is_known else None,
                "win": list(win) if win is not None else None,
            }
        rows.append({"name": name, "cells": cells})
    return rows


def won_and_lost(step: int, tables: Mapping[str, Table], prompts: Mapping[int, str]) -> Record | None:
    """The scores of every sample beside the base's; None where there is nothing to compare with.

    Args:
        step: Number of optimizer steps before the evaluation.
        tables: Numbers of every sample by the weights, the base's among them.
        prompts: Text of each prompt that is known, by its number in the tables.
    """
    base = tables.get(BASE)
    ours = {kind: own for kind, own in tables.items() if kind != BASE and are_paired(own, base)}
    if base is None or not ours:
        return None
    columns = won(next(iter(ours.values())), base)
    columns = [name for name in (HELD_OUT, "judge", "reward") if name in columns] + [
        name for name in columns if name not in (HELD_OUT, "judge", "reward")
    ]
    rows = torch.arange(len(base.indices))
    total = len(rows)
    if total > MAX_SAMPLES:
        change = next(iter(ours.values())).columns[columns[0]] - base.columns[columns[0]]
        order = change.nan_to_num(0.0).argsort()
        rows = torch.cat([order[: MAX_SAMPLES // 2], order[-MAX_SAMPLES // 2 :]]).sort().values
    groups = base.groups[rows].tolist()
    return {
        "step": step,
        "total": total,
        "columns": columns,
        "weights": list(ours),
        "indices": base.indices[rows].tolist(),
        "prompts": [prompts.get(group, f"prompt {group}") for group in groups],
        "has_unnamed": not prompts.keys() >= set(groups),
        "counts": {
            kind: {name: counts(own.columns[name] - base.columns[name]) for name in columns}
            for kind, own in ours.items()
        },
        "values": {
            kind: {name: [rounded(value) for value in own.columns[name][rows].tolist()] for name in columns}
            for kind, own in {BASE: base, **ours}.items()
        },
    }


def counts(change: Tensor) -> dict[str, int]:
    """The numbers of samples, of which fewer may be listed, by what became of their score."""
    found = {"won": change > 0, "lost": change < 0, "alike": change == 0}
    known = {name: int((own & change.isfinite()).sum()) for name, own in found.items()}
    return {**known, "unknown": len(change) - sum(known.values())}


def rounded(value: float) -> float:
    """As many digits as people read."""
    return float(f"{value:.{DIGITS}g}")


def prompts_by_group(run: RunFolder, tables: Mapping[str, Table], metadata: Sequence[Record]) -> dict[int, str]:
    """The prompts of the tables' numbers, as far as they were recorded.

    Raises:
        ValueError: if their file cannot be read.
    """
    known = dict(enumerate(run.read_prompts()))
    if known or not tables:
        return known
    table = next(iter(tables.values()))
    group_of = dict(zip(table.indices.tolist(), table.groups.tolist(), strict=True))
    logged = {own.get("index"): own.get("prompt") for own in metadata}
    return {group_of[index]: str(prompt) for index, prompt in logged.items() if index in group_of}


class Logged:
    """The logged pictures that a page shows: of which prompts, weights and steps, no more than a page may hold.

    Args:
        run: Folder of the run.
        metadata: Records of its pictures.
    """

    def __init__(self, run: RunFolder, metadata: Sequence[Record]) -> None:
        self.run = run
        self.records = {
            (own["step"], str(own["weights"]), own["index"]): own
            for own in metadata
            if {"weights", "index", "prompt"} <= own.keys() and isinstance(own["index"], int)
        }
        has_clips = any(run.samples.clip(*key).is_file() for key in self.records)
        self.most_pictures = MAX_PICTURES // (CLIP_SHARE if has_clips else 1)
        most_prompts = MAX_PROMPTS // (CLIP_SHARE if has_clips else 1)
        self.indices = sorted({index for _, _, index in self.records})[:most_prompts]
        trained = {key for key in self.records if not self.is_base(key)}
        self.weights = sorted({kind for _, kind, _ in trained}, key=lambda kind: (kind != "policy", kind))
        self.all_steps = sorted({step for step, _, _ in trained})
        self.bases = {key[2]: key for key in reversed(self.records) if self.is_base(key)}
        self.newest = {key[2]: key for key in sorted(self.records)}
        prompts = len(self.indices) or 1
        most = (self.most_pictures - prompts) // (prompts * (len(self.weights) or 1))
        self.steps = thinned(self.all_steps, most)

    @staticmethod
    def is_base(key: tuple[int, str, int]) -> bool:
        """Whether a picture was drawn by the weights before training."""
        step, weights, _ = key
        return weights == BASE or step == 0

    def record_of(self, index: int) -> Record:
        """The newest record of an evaluation sample."""
        return self.records[self.newest[index]]

    def grid(self) -> Record:
        """What the page's grid shows: its prompts, steps and weights, and the scores of each picture."""
        scores: dict[str, dict[str, Any]] = {}
        for index in self.indices:
            if base := self.bases.get(index):
                scores.setdefault(BASE, {})[str(index)] = self.records[base].get("scores") or {}
            for step in self.steps:
                for kind in self.weights:
                    if own := self.records.get((step, kind, index)):
                        scores.setdefault(f"{step}/{kind}", {})[str(index)] = own.get("scores") or {}
        named = [(index, self.record_of(index)) for index in self.indices]
        prompts = [{"index": i, "prompt": str(own["prompt"]), "seed": own.get("seed")} for i, own in named]
        return {
            "prompts": prompts,
            "steps": self.steps,
            "all": len(self.all_steps),
            "weights": self.weights,
            "scores": scores,
        }

    def pictures(self, thumbnails: Thumbnails) -> dict[str, dict[str, str]]:
        """The pictures as data URIs: a block for the base, by index, and one for each step, by weights and index."""
        samples = self.run.samples
        keys = {index: self.bases[index] for index in self.indices if index in self.bases}
        blocks = {BASE: {str(i): thumbnails.url(samples.picture(*key)) for i, key in keys.items()}}
        for step in self.steps:
            wanted = [(kind, index) for kind in self.weights for index in self.indices]
            blocks[str(step)] = {
                f"{kind}/{index}": url
                for kind, index in wanted
                if (step, kind, index) in self.records and (url := thumbnails.url(samples.picture(step, kind, index)))
            }
        return blocks
