"""Which records a run trains on and which it is evaluated on, and what was left out."""

from collections.abc import Sequence
from typing import NamedTuple

from srpo_lightning.batch import Size
from srpo_lightning.data.colours import size_as_seen
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
    def to_evaluate(self) -> "Selection":
        """Without what is trained on."""
        return self._replace(train=[], images=[], pictures=[], num_in_both=0)

    @property
    def texts(self) -> list[str]:
        """Everything that is to be encoded, each once."""
        sets = [*self.sets, self.evaluation]
        return list(dict.fromkeys(text for own in sets for text in own.prompts))


def select(
    train: Sources,
    evaluation: Sources | None,
    validation_fraction: float,
    images: Sources | None,
    offline_ratio: float,
    sizes: Sequence[Size],
    limits: Limits = LIMITS,
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

    Raises:
        ValueError: with the cure, if the settings contradict each other, or nothing is left.
    """
    if (evaluation is None) == (validation_fraction == 0):
        raise ValueError(
            "data.evaluation and data.validation_fraction both say what is held out: give a prompt file to the one, or "
            "to the other a part of the training prompts such as 0.05"
        )
    if images is not None and not offline_ratio:
        raise ValueError(
            "data.images is given, but data.offline_ratio is 0, so that no step trains on these pictures: set it to "
            "their share of the steps, for instance 0.5, or leave data.images away"
        )
    sources = [(read_prompts(source).unique(), source.weight) for source in listed(train)]
    named = sources if images is None else [(read_prompts(s).unique(), s.weight) for s in listed(images)]
    if validation_fraction:
        parts = [prompts.split(validation_fraction) for prompts, _ in sources]
        held_out = PromptSet.of([validation for _, validation in parts]).unique()
        sources = [(own, weight) for (own, _), (_, weight) in zip(parts, sources, strict=True)]
        named = [(prompts.split(validation_fraction)[0], weight) for prompts, weight in named]
        if not len(held_out) or not all(len(prompts) for prompts, _ in sources):
            raise ValueError(
                f"data.validation_fraction {validation_fraction} leaves {len(held_out)} prompts to evaluate and "
                f"{sum(len(prompts) for prompts, _ in sources)} to train: choose another, or give data.evaluation"
            )
    else:
        assert evaluation is not None
        held_out = PromptSet.of([read_prompts(source) for source in listed(evaluation)]).unique()
    if images is not None:
        _refuse_without_picture([prompts for prompts, _ in named])
    real, pictures = _pictures(named, sizes, limits) if offline_ratio else ([], [])
    trained = {text for prompts, _ in sources for text in prompts.prompts}
    return Selection(
        [Selected(prompts, prompts.sizes, weight) for prompts, weight in sources],
        real,
        pictures,
        held_out,
        sum(text in trained for text in held_out.prompts),
    )


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
    named: Sequence[tuple[PromptSet, float]], sizes: Sequence[Size], limits: Limits
) -> tuple[list[Selected], list[Picture]]:
    real, pictures = [], []
    for prompts, weight in named:
        with_picture = prompts.with_pictures()
        if len(with_picture):
            own = [
                Picture(image, record.size or nearest(size_as_seen(image, limits), sizes), limits)
                for record in with_picture
                for image in [str(record.image)]
            ]
            pictures += own
            real.append(Selected(with_picture, [picture.size for picture in own], weight))
    if not real:
        raise ValueError(
            "data.offline_ratio asks for real pictures, but no record names one: give data.images, a folder of "
            "pictures with captions in .txt files beside them, a .jsonl with a column `image`, or a webdataset .tar"
        )
    return real, pictures
