"""Which records a run trains on and which it is evaluated on, and what was left out."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from srpo_lightning.batch import Size
from srpo_lightning.data.clips import clip_size
from srpo_lightning.data.colours import size_as_seen
from srpo_lightning.data.columns import CELL, check_size
from srpo_lightning.data.images import Picture, nearest
from srpo_lightning.data.picture_files import LIMITS, Limits
from srpo_lightning.data.prompts import PromptSet, Sources, listed, read_prompts


class Selected(NamedTuple):
    """The records of one source.

    Args:
        prompts: to train on.
        sizes: of their pictures; None: any that the run has.
        weight: of the source.
    """

    prompts: PromptSet
    sizes: Sequence[Size | None]
    weight: float


class Selection(NamedTuple):
    """The records of a run.

    Args:
        train: prompts to draw pictures for.
        images: captions of real pictures.
        pictures: these, in the same order.
        evaluation: held-out prompts.
        num_in_both: evaluation prompts that are trained on too.
    """

    train: list[Selected]
    images: list[Selected]
    pictures: list[Picture]
    evaluation: PromptSet
    num_in_both: int

    @property
    def sets(self) -> list[PromptSet]:
        """All records that are trained on."""
        return [source.prompts for source in (*self.train, *self.images)]

    @property
    def texts(self) -> list[str]:
        """Everything that is to be encoded, each once."""
        sets = [*self.sets, self.evaluation]
        return list(dict.fromkeys(text for own in sets for text in own.prompts))


def check_sources(
    evaluation: Sources | None, validation_fraction: float, images: Sources | None, offline_ratio: float
) -> None:
    """Refuse two ways to hold prompts out, or none, and pictures that no step trains on, before any is read.

    Raises:
        ValueError: with the cure.
    """
    if (evaluation is None) == (validation_fraction == 0):
        raise ValueError(
            "data.evaluation and data.validation_fraction both say what is held out: give a prompt file to the one, or "
            "to the other a part of the training prompts such as 0.05"
        )
    if images is not None and not offline_ratio:
        raise ValueError(
            "data.images is given, but data.offline_ratio is 0, so that no step trains on these pictures: set it to "
            "their share of the steps, for instance 0.5, or leave data.images out"
        )


def sizes_of(sizes: Sequence[tuple[int, int]] | None, cell: int) -> list[Size]:
    """(height, width) of [width, height], which pictures can have.

    Raises:
        ValueError: with the cure, if there are none, or one is no whole number of cells.
    """
    if sizes == []:
        raise ValueError("data.sizes is []: give at least one [width, height], or leave it out")
    for number, (width, height) in enumerate(sizes or []):
        check_size(width, height, f"data.sizes[{number}]", cell)
    return [(height, width) for width, height in sizes or []]


def check_cells(selection: Selection, cell: int) -> None:
    """Refuse records whose pictures the policy cannot have.

    Raises:
        ValueError: naming the record, and the nearest sizes that it can.
    """
    for prompts in [*selection.sets, selection.evaluation] if CELL % cell else ():  # else they were checked when read
        for text, size in zip(prompts.prompts, prompts.sizes, strict=True):
            if size is not None:
                check_size(size[1], size[0], f"the picture of {text[:80]!r}", cell)


def select_evaluation(train: Sources, evaluation: Sources | None, validation_fraction: float) -> Selection:
    """Read what is evaluated alone; the training prompts are looked at where it is a part of them, pictures never.

    Args:
        train: prompts.
        evaluation: held-out prompts.
        validation_fraction: of the training prompts, where there are no others to evaluate.

    Raises:
        ValueError: with the cure, if the sources cannot be read, or nothing is left.
    """
    if evaluation is not None:
        held_out = PromptSet.of([read_prompts(source) for source in listed(evaluation)]).unique()
    else:
        held_out = _split([read_prompts(source).unique() for source in listed(train)], validation_fraction)[1]
    return Selection([], [], [], held_out, 0)


def select(
    train: Sources,
    evaluation: Sources | None,
    validation_fraction: float,
    images: Sources | None,
    offline_ratio: float,
    sizes: Sequence[Size],
    limits: Limits = LIMITS,
    num_frames: int = 1,
) -> Selection:
    """Read, clean and split the sources of a run.

    Args:
        train: prompts.
        evaluation: held-out prompts.
        validation_fraction: of the training prompts, where there are no others to evaluate.
        images: captions of real pictures; None: the training records that name one.
        offline_ratio: the share of steps that need them.
        sizes: that real pictures are brought to.
        limits: up to where real pictures are read.
        num_frames: of real clips; 1: they are pictures.

    Raises:
        ValueError: with the cure, if the sources cannot be read, or nothing is left.
    """
    sources = [read_prompts(source).unique() for source in listed(train)]
    weights = [source.weight for source in listed(train)]
    named = sources if images is None else [read_prompts(source).unique() for source in listed(images)]
    weights_of_named = weights if images is None else [source.weight for source in listed(images)]
    if images is not None:
        _refuse_without_picture(named)
    if evaluation is None:
        sources, held_out = _split(sources, validation_fraction)
        named = [prompts.split(validation_fraction)[0] for prompts in named]
    else:
        held_out = select_evaluation(train, evaluation, validation_fraction).evaluation
    own = list(zip(named, weights_of_named, strict=True))
    real, pictures = _pictures(own, sizes, limits, num_frames) if offline_ratio else ([], [])
    trained = {text for prompts in sources for text in prompts.prompts}
    return Selection(
        [Selected(prompts, prompts.sizes, weight) for prompts, weight in zip(sources, weights, strict=True)],
        real,
        pictures,
        held_out,
        sum(text in trained for text in held_out.prompts),
    )


def _split(sources: Sequence[PromptSet], fraction: float) -> tuple[list[PromptSet], PromptSet]:
    parts = [prompts.split(fraction) for prompts in sources]
    train, held_out = [own for own, _ in parts], PromptSet.of([validation for _, validation in parts]).unique()
    if not len(held_out) or not all(map(len, train)):
        raise ValueError(
            f"data.validation_fraction {fraction} leaves {len(held_out)} prompts to evaluate and "
            f"{sum(map(len, train))} to train: choose another, or give data.evaluation"
        )
    return train, held_out


def _refuse_without_picture(named: Sequence[PromptSet]) -> None:
    for prompts in named:
        missing = len(prompts) - len(prompts.with_pictures())
        if missing:
            first = next(record.text for record in prompts if record.image is None)
            raise ValueError(
                f"data.images: {missing} of {len(prompts)} records name no picture, the first is {first[:80]!r}: "
                "give it one, or move such records to data.train"
            )


def _pictures(
    named: Sequence[tuple[PromptSet, float]], sizes: Sequence[Size], limits: Limits, num_frames: int
) -> tuple[list[Selected], list[Picture]]:
    real, pictures = [], []
    seen = partial(clip_size, num_frames=num_frames) if num_frames > 1 else size_as_seen
    for prompts, weight in named:
        with_picture = prompts.with_pictures()
        if len(with_picture):
            own = [
                Picture(image, record.size or nearest(seen(image, limits=limits), sizes), limits, num_frames)
                for record in with_picture
                for image in [str(record.image)]
            ]
            pictures += own
            real.append(Selected(with_picture, [picture.size for picture in own], weight))
    if not real:
        raise ValueError(
            "data.offline_ratio asks for real pictures, but no record names one: give data.images, a folder of "
            "pictures, or of clips, with captions in .txt files beside them, a .jsonl with a column `image`, or a "
            "webdataset .tar"
        )
    return real, pictures
