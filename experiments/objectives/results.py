"""What runs have left behind: curves over compute, and statistics over seeds."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.objectives.plan import Run
from srpo_lightning.evaluation.comparison import summary
from srpo_lightning.evaluation.metrics import Interval
from srpo_lightning.files import records
from srpo_lightning.run_folder import RunFolder

PEAK = "peak.json"
DIGITS = 6  # of the numbers that are kept

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom."""


class Point(NamedTuple):
    """An evaluation.

    Args:
        forwards: Number of the policy's forward passes until then.
        seconds: Seconds of training steps until then.
        numbers: Numbers that were measured, by name.
    """

    forwards: float
    seconds: float
    numbers: dict[str, float]


class Curve(NamedTuple):
    """A run, from the weights before training to its end.

    Args:
        run: Run that was made.
        points: Evaluations of the run.
        peak_bytes: Peak of memory; None where the run was interrupted and its peak is not known.
    """

    run: Run
    points: list[Point]
    peak_bytes: int | None

    @property
    def last(self) -> dict[str, float]:
        """The numbers at the end."""
        return self.points[-1].numbers

    @property
    def first(self) -> dict[str, float]:
        """The numbers before training."""
        return self.points[0].numbers

    def reaches(self, name: str, value: float, of: str = "seconds") -> float | None:
        """Seconds or forwards until a number first is `value`, on the straight line between evaluations."""
        return first_crossing([(getattr(point, of), point.numbers[name]) for point in self.points], value)


def first_crossing(points: Iterable[tuple[float, float]], value: float) -> float | None:
    """The x where the y of (x, y) first rises to `value`, on the straight line between points; None: nowhere."""
    for (start, low), (end, high) in pairwise(points):
        if low < value <= high:
            return start + (end - start) * (value - low) / (high - low)
    return None


def read_curve(run: Run, labels: Sequence[str]) -> Curve:
    """The evaluations of the policy's own weights."""
    table = RunFolder(run.folder).read_base()
    assert table is not None
    records = {0: summary(table, None, labels) | {"drift": 0.0}}
    for record in RunFolder(run.folder).read_metrics():
        if record["weights"] == "policy" and record["step"]:
            records[int(record["step"])] = {k: float(v) for k, v in record.items() if k not in ("step", "weights")}
    seconds = seconds_per_step(run.folder) if run.steps else 0.0
    points = [Point(step * run.forwards, step * seconds, numbers) for step, numbers in sorted(records.items())]
    peak = run.folder / PEAK
    return Curve(run, points, json.loads(peak.read_text())["bytes"] if peak.is_file() else None)


class Archive:
    """The curves of runs that have come to their end, a line of JSON each: a run in it is never made again.

    The file can be carried to another machine, where a benchmark then goes on.

    Args:
        path: File of the curves.
        labels: Labels that pictures are told apart by.
    """

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        self.path, self.labels = path, labels
        self._lines = {line["key"]: line for line in records.read(path)}

    def __contains__(self, run: Run) -> bool:
        """Whether a run with all of these settings is done."""
        return self._line(run) is not None

    def _line(self, run: Run) -> records.Record | None:
        return next((self._lines[key] for key in (run.key, *run.former_keys) if key in self._lines), None)

    def add(self, run: Run) -> None:
        """Keep the curve of a run."""
        curve = read_curve(run, self.labels)
        line = {
            "step": run.steps,
            "key": run.key,
            "folder": str(run.folder),
            "peak_bytes": curve.peak_bytes,
            "points": [
                {"forwards": p.forwards, "seconds": rounded(p.seconds)} | {n: rounded(v) for n, v in p.numbers.items()}
                for p in curve.points
            ],
        }
        records.append(self.path, line)
        self._lines[run.key] = line

    def curves(self, runs: Iterable[Run]) -> list[Curve]:
        """The curves of those runs that are done."""
        return [self.curve(run) for run in runs if run in self]

    def curve(self, run: Run) -> Curve:
        """The curve of a run that is done; numbers that were not known are NaN."""
        line = self._line(run)
        assert line is not None, run
        known = [{n: math.nan if v is None else v for n, v in point.items()} for point in line["points"]]
        points = [Point(own.pop("forwards"), own.pop("seconds"), own) for own in known]
        return Curve(run, points, line["peak_bytes"])


def rounded(value: float) -> float:
    """A number to the digits that are kept."""
    return float(f"{value:.{DIGITS}g}")


def training_seconds(folder: Path) -> dict[int, float]:
    """Seconds of each step of a run that logs every step, without evaluations."""
    events = EventAccumulator(str(RunFolder(folder).logs), size_guidance={"scalars": 0})
    events.Reload()
    parts = [{e.step: e.value for e in events.Scalars(f"train/seconds_{what}")} for what in ("rollout", "update")]
    return {step: parts[0][step] + parts[1][step] for step in parts[0].keys() & parts[1].keys()}


def seconds_per_step(folder: Path) -> float:
    """The mean seconds of a run's steps."""
    return statistics.fmean(training_seconds(folder).values())


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval by Student's t; of one value the interval is not known (NaN)."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if not freedom:
        return Interval(mean, math.nan, math.nan)
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def last_of(curves: Sequence[Curve], name: str) -> Interval:
    """A number at the end of the runs of a row."""
    return mean_over_seeds([curve.last[name] for curve in curves])


def change_of(curves: Sequence[Curve], name: str) -> Interval:
    """How far a number has moved from before training."""
    return mean_over_seeds([curve.last[name] - curve.first[name] for curve in curves])


def difference(
    ours: Sequence[Curve], theirs: Sequence[Curve], what: Callable[[Curve], float], share: float = 1.0
) -> Interval:
    """Ours less this share of theirs, of anything of two rows, seed by seed: both start from the same noise."""
    by_seed = {curve.run.seed: what(curve) for curve in theirs}
    return mean_over_seeds(
        [what(curve) - share * by_seed[curve.run.seed] for curve in ours if curve.run.seed in by_seed]
    )


def with_half(interval: Interval, digits: int = 3, sign: str = "") -> str:
    """A mean, and half of its interval where there is one; the sign "+" shows it of positive means too."""
    half = f" +- {interval.half:.{digits}f}" if interval.is_known else ""
    return f"{interval.value:{sign}.{digits}f}{half}"


Results = Mapping[str, Sequence[Curve]]
"""The curves of each row at its chosen learning rate, one per seed; of `base` single points."""


def concept_of(results: Results) -> str | None:
    """The name of the number that says how often the concept is found; None where there is none."""
    numbers = next(iter(results.values()))[0].last
    return next((name for name in numbers if name.startswith("top")), None)
