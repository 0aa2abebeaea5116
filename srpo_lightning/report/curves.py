"""Curves of a run: what its evaluations found, and what its steps logged."""

from collections.abc import Iterable, Sequence
from typing import Any

from srpo_lightning.evaluation.comparison import BASE, HELD_OUT
from srpo_lightning.evaluation.meanings import meaning
from srpo_lightning.files.records import Record
from srpo_lightning.picture_statistics import STATISTICS
from srpo_lightning.report.thumbnails import thinned
from srpo_lightning.run_folder import RunFolder

MAX_EVALUATIONS = 400
NUM_BUCKETS = 200
"""Number of points of a curve of training steps at most: each is the mean of as many steps as it takes."""

GROUPS = ("Scores", "Labels", "Against the base", "Pictures", "Training steps")
FIRST = (HELD_OUT, "reward", "judge", "prompt")


def group_of(name: str) -> str:
    """The heading that a number's curve stands under."""
    if name.startswith(("train/", "lr")):
        return "Training steps"
    if name.startswith("share/"):
        return "Labels"
    if name.startswith("win/") or name == "drift":
        return "Against the base"
    return "Pictures" if name in {*STATISTICS, "diversity", "prompt_diversity"} else "Scores"


def in_order(names: Iterable[str]) -> list[str]:
    """Names by their heading, the most telling ones first."""

    def place(name: str) -> tuple[int, int]:
        return GROUPS.index(group_of(name)), FIRST.index(name) if name in FIRST else len(FIRST)

    return sorted(dict.fromkeys(names), key=place)


def by_step(metrics: Iterable[Record]) -> list[Record]:
    """The records by their step; of weights that were measured again after a step the last one alone."""
    last = {(own["step"], str(own.get("weights"))): own for own in metrics}
    return sorted(last.values(), key=lambda own: int(own["step"]))


def evaluation_curves(metrics: Sequence[Record]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (step, value) of each number by the weights, of at most MAX_EVALUATIONS evaluations.

    What the base scores before the first step is the first point of the policy, and a series of its own.
    """
    records = [own for own in metrics if "weights" in own]
    steps = set(thinned(sorted({own["step"] for own in records}), MAX_EVALUATIONS))
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        kinds = [str(record["weights"]), *([BASE] if record["step"] == 0 else [])]
        for name, value in record.items():
            if name in ("step", "weights", "key") or not isinstance(value, int | float) or record["step"] not in steps:
                continue
            for kind in kinds:
                curves.setdefault(name, {}).setdefault(kind, []).append((record["step"], value))
    return curves


class TrainingScalars:
    """What TensorBoard's files of a run say of its training steps; a second reading reads what is new."""

    def __init__(self) -> None:
        self._events: dict[str, Any] = {}

    def read(self, run: RunFolder) -> dict[str, list[tuple[int, float]]]:
        """Points (step, value) of each number by its name; none where nothing was logged."""
        if not run.logs.is_dir():
            return {}
        # It imports whatever reads remote files where that is installed, which a command's help need not wait for.
        from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, IMAGES, SCALARS, EventAccumulator

        logs = str(run.logs)
        if logs not in self._events:
            self._events[logs] = EventAccumulator(logs, size_guidance={SCALARS: 0, IMAGES: 1, HISTOGRAMS: 1})
        events = self._events[logs].Reload()
        names = [tag for tag in events.Tags()[SCALARS] if group_of(tag) == "Training steps"]
        # What a killed run logged after its checkpoint is logged again: the last value of a step counts.
        return {name: smoothed(sorted({e.step: e.value for e in events.Scalars(name)}.items())) for name in names}


def smoothed(points: Sequence[tuple[int, float]], num_buckets: int = NUM_BUCKETS) -> list[tuple[int, float]]:
    """Means of neighbouring points, each at the step of its last."""
    size = -(-len(points) // num_buckets) or 1
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], sum(value for _, value in bucket) / len(bucket)) for bucket in buckets]


def as_charts(
    curves: dict[str, dict[str, list[tuple[int, float]]]], scalars: dict[str, list[tuple[int, float]]]
) -> list[Record]:
    """The charts of a page, in their order."""
    of_training = {name: {"training": points} for name, points in scalars.items()}
    return [
        {
            "name": name,
            "group": group_of(name),
            "series": [{"name": kind, "points": points, "is_level": kind == BASE} for kind, points in own.items()],
        }
        for name in in_order([*curves, *of_training])
        for own in [curves.get(name) or of_training[name]]
    ]


def meanings(names: Iterable[str]) -> dict[str, str]:
    """What each number is."""
    return {name: meaning(name) for name in names}
