"""What the page of a run shows, from the run folder's files alone; what cannot be read is said and left out."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from srpo_lightning.evaluation.comparison import HELD_OUT
from srpo_lightning.evaluation.pictures import record_if_whole
from srpo_lightning.files import records
from srpo_lightning.files.provenance import software
from srpo_lightning.files.records import Record
from srpo_lightning.report import curves, samples
from srpo_lightning.report.configuration import asked_for, class_of, departures, read_configuration
from srpo_lightning.report.page import write_page
from srpo_lightning.report.samples import Logged
from srpo_lightning.report.thumbnails import Thumbnails
from srpo_lightning.run_folder import RunFolder

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a record raises that a disk, a kill or a person has changed."""

ACTIONS = {
    "wait": "waits",
    "warn": "warned",
    "stop": "ended training",
    "lower_learning_rate": "lowered the learning rate",
}

Value = TypeVar("Value")


class RunPage:
    """Writes the page of a run, again and again: what it has read before is not read anew.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.thumbnails = Thumbnails()
        self.scalars = curves.TrainingScalars()
        self.notes: list[str] = []

    def write(self) -> Path:
        """Write the page, complete or absent, and return its path.

        Raises:
            OSError, FullDiskError: if it cannot be written.
        """
        content, pictures = self.content()
        write_page(self.run.page, f"{content['name']}: report", "run.js", content, pictures)
        return self.run.page

    def content(self) -> tuple[Record, dict[str, dict[str, str]]]:
        """Everything that the page shows, as JSON takes it, and its pictures in blocks."""
        self.notes = []
        metrics = curves.by_step(self.read(self.run.read_metrics) or [])
        metadata = self.read(partial(records.read, self.run.samples.metadata)) or []
        text, settings = self.read(partial(read_configuration, self.run)) or ("", {})
        step, tables = self.read(partial(samples.last_tables, self.run, metrics)) or (0, {})
        prompts = self.read(partial(samples.prompts_by_group, self.run, tables, metadata)) or {}
        advice = self.read(partial(records.read, self.run.advice)) or []
        scalars = self.read(partial(self.scalars.read, self.run)) or {}
        found = self.read(partial(curves.evaluation_curves, metrics)) or {}
        logged = self.read(partial(Logged, self.run, metadata)) or Logged(self.run, [])
        pictures = self.read(partial(logged.pictures, self.thumbnails)) or {}
        self.thumbnails.forget_unused()
        asked = self.read(partial(asked_for, settings)) or []
        content = {
            "name": self.run.path.resolve().name,
            "asked": [*asked, *(self.read(partial(self.facts, metrics, settings, metadata)) or [])],
            "findings": self.read(partial(findings, metrics, advice, settings)) or [],
            "last": self.read(partial(samples.last_values, metrics, tables)) or [],
            "charts": curves.as_charts(found, scalars),
            "advice": self.read(partial(told, advice)) or [],
            "samples": self.read(partial(samples.won_and_lost, step, tables, prompts)),
            "grid": logged.grid(),
            "configuration": {
                "text": text,
                "departures": self.read(partial(departures, self.run, settings)),
            },
            "meanings": curves.meanings([*found, *scalars]),
            "notes": self.notes,
            "written": f"{time.strftime('%Y-%m-%d %H:%M %Z')} by {software()}",
        }
        return content, pictures

    def read(self, reader: Callable[[], Value]) -> Value | None:
        """What a reader finds; None where a record cannot be read, which is noted."""
        try:
            return reader()
        except UNREADABLE as error:
            is_told = isinstance(error, OSError | ValueError)
            self.notes.append(str(error) if is_told else f"a record is not as it was written: {error!r}")
            return None

    def facts(self, metrics: Sequence[Record], settings: Record, metadata: Sequence[Record]) -> list[tuple[str, str]]:
        """How far the run is, when it was and by which software."""
        steps = max((own["step"] for own in metrics), default=0)
        limit = (settings.get("trainer") or {}).get("max_steps")
        told = [("Steps", f"{steps} evaluated" + (f" of {limit}" if isinstance(limit, int) and limit > 0 else ""))]
        times = [path.stat().st_mtime for path in (*self.run.configs(), self.run.metrics) if path.is_file()]
        if times:
            told.append(("Files written", " to ".join(dict.fromkeys(map(day, (min(times), max(times)))))))
        last = self.run.samples.path / str(metadata[-1].get("file")) if metadata else None
        record = record_if_whole(last) if last is not None else None
        return [*told, ("Software", str((record or {}).get("software") or "not recorded"))]


def day(seconds: float) -> str:
    """A moment as people write it, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def told(advice: Sequence[Record]) -> list[Record]:
    """What the guard said of evaluations, in words."""
    found = []
    for own in advice:
        action, reasons = str(own.get("action")), "; ".join(map(str, own.get("reasons") or ()))
        best = f"the best held-out score was at step {own.get('best_step')}"
        text = f"{reasons}. The guard {ACTIONS.get(action, action)}; {best}."
        found.append({"step": own["step"], "acts": action != "wait", "text": text})
    return found


def findings(metrics: Sequence[Record], advice: Sequence[Record], settings: Record) -> list[str]:
    """What the run has found, in sentences: the held-out score, its best step, and what speaks against the last."""
    scored = [own for own in metrics if known(own.get(HELD_OUT)) and own.get("weights") == "policy"]
    if not scored:
        return []
    first, last, best = scored[0], scored[-1], max(scored, key=lambda own: float(own[HELD_OUT]))
    before = "before training" if first["step"] == 0 else f"at step {first['step']}"
    values = f"{first[HELD_OUT]:.3f} {before}, {last[HELD_OUT]:.3f} at step {last['step']}"
    sentences = [f"Held-out score of the policy: {values}."]
    if best["step"] != last["step"]:
        sentences.append(f"It was best at step {best['step']}: {best[HELD_OUT]:.3f}.")
    if all(known(own.get(name)) for own in (first, last) for name in ("reward", "judge")):
        reward, judge = (float(last[name]) - float(first[name]) for name in ("reward", "judge"))
        if reward > 0 > judge:
            sentences.append("The training reward rose and the judge fell: the policy may be exploiting its reward.")
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    is_guarded = "OverOptimizationGuard" in map(class_of, callbacks)
    if is_guarded and not advice:
        sentences.append("The guard has recorded nothing against any evaluation.")
    return sentences


def known(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and math.isfinite(value)
