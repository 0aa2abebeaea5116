"""Whose pictures are shown: the logged pictures of a run after one step, by one kind of weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from srpo_lightning.evaluation.comparison import BASE
from srpo_lightning.files import records
from srpo_lightning.files.records import Record
from srpo_lightning.report.comparison_page import names_of
from srpo_lightning.run_folder import PictureFolder, RunFolder

Place: TypeAlias = tuple[str, int]
"""A prompt, and how many pictures of the same prompt come before in its source."""

PREFERRED = ("ema", "policy", BASE)
"""Weights whose pictures are taken where none are named, the first that has some."""


class Shown(NamedTuple):
    """A picture of a source.

    Args:
        path: File of the picture.
        sample: Number of the evaluation sample.
        scores: Scores that the run has logged of it, by their name; those that are no numbers are left out.
    """

    path: Path
    sample: int
    scores: Mapping[str, float]


class Source(NamedTuple):
    """The pictures of a run after one step, by one kind of weights.

    Args:
        name: Name in results; raters never see it.
        run: Folder of the run.
        pictures: Pictures by their prompt and place among those of that prompt.
    """

    name: str
    run: RunFolder
    pictures: Mapping[Place, Shown]


class Named(NamedTuple):
    """What a path on the command line means.

    Args:
        folder: Folder of pictures.
        run: Folder of its run.
        step: Number of optimizer steps.
        weights: Name of the weights.
    """

    folder: PictureFolder
    run: Path
    step: int
    weights: str


def read_sources(paths: Sequence[str]) -> list[Source]:
    """What is named on the command line.

    Args:
        paths: Folders of runs, of which the newest logged step is taken, or folders of pictures in them, such as
            `samples/step-00000020/ema`.

    Raises:
        ValueError: naming the folder, if it holds no pictures with records, or clips, or two paths mean the same
            pictures.
    """
    named = [_named(Path(path).expanduser()) for path in paths]
    folders = list(dict.fromkeys(own.run.resolve() for own in named))
    runs = dict(zip(folders, names_of(folders), strict=True))
    labels = [f"{runs[own.run.resolve()]} {label(own)}" for own in named]
    for path, own in zip(paths, labels, strict=True):
        if labels.count(own) > 1:
            raise ValueError(f"{path} stands for pictures that are named twice, {own}: name each once")
    return [_read(own, name) for own, name in zip(named, labels, strict=True)]


def label(named: Named) -> str:
    """What tells pictures of one run apart."""
    drawn = BASE if not named.step else f"{named.weights} {named.step}"
    return drawn if named.folder.path.name == "samples" else f"{drawn} ({named.folder.path.name})"


def _named(path: Path) -> Named:
    absolute = path.resolve()
    step, weights = absolute, ""
    if absolute.parent.name.startswith("step-"):
        step, weights = absolute.parent, absolute.name
    if not step.name.startswith("step-"):
        return _of_run(path)
    folder = PictureFolder(step.parent)
    number = step.name.removeprefix("step-")
    if not number.isdecimal() or not folder.metadata.is_file():
        raise ValueError(f"{path} is no folder of a run's pictures: name one such as RUN/samples/step-00000020/ema")
    found = {str(own.get("weights")) for own in _records(folder) if own["step"] == int(number)}
    return Named(folder, folder.path.parent, int(number), _chosen(path, found, weights))


def _of_run(path: Path) -> Named:
    folder = RunFolder(path).samples
    found = _records(folder)
    if not found:
        raise ValueError(f"{path} holds no pictures with records ({folder.metadata}): name one that SampleLogger kept")
    step = max(own["step"] for own in found)
    weights = {str(own.get("weights")) for own in found if own["step"] == step}
    return Named(folder, path.resolve(), step, _chosen(path, weights, ""))


def _chosen(path: Path, found: set[str], weights: str) -> str:
    if weights in found:
        return weights
    chosen = next((own for own in PREFERRED if own in found and not weights), None)
    if chosen is None:
        there = ", ".join(sorted(found)) or "none"
        raise ValueError(f"{path}: no record is of these pictures; of that step there are those of {there}")
    return chosen


def _records(folder: PictureFolder) -> list[Record]:
    found = records.read(folder.metadata)
    return [own for own in found if isinstance(own.get("index"), int) and isinstance(own.get("prompt"), str)]


def _read(named: Named, name: str) -> Source:
    own = {
        record["index"]: record
        for record in _records(named.folder)
        if (record["step"], record.get("weights")) == (named.step, named.weights)
    }
    seen: Counter[str] = Counter()
    pictures = {}
    for index, record in sorted(own.items()):
        prompt = record["prompt"]
        path = named.folder.picture(named.step, named.weights, index)
        if "num_frames" in record:
            raise ValueError(
                f"{path} is a strip of a clip's frames, and people would judge it standing still: name a run of "
                "pictures, with num_frames 1"
            )
        pictures[prompt, seen[prompt]] = Shown(path, index, numbers(record.get("scores")))
        seen[prompt] += 1
    return Source(name, RunFolder(named.run), pictures)


def numbers(scores: Any) -> dict[str, float]:
    """The scores in a record that are numbers; NaN is null in it."""
    found = scores if isinstance(scores, dict) else {}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
