"""What raters are shown and how many answers are wanted: settled in a file before the first answer."""

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from srpo_lightning.evaluation.pictures import picture_if_whole
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.ratings.sources import Place, Source

Task: TypeAlias = Literal["grades", "pairs"]

VERSION = 1
GRADES = ("fail", "pass", "good", "excellent")
"""The four grades of the paper's study, from the worst."""

SIDES = ("left", "equal", "right")

QUESTIONS: dict[str, dict[str, str]] = {
    "grades": {
        "realism": "How real and detailed is the picture?",
        "aesthetics": "How beautiful is the picture?",
        "prompt": "How well does the picture show what the text says?",
    },
    "pairs": {"better": "Which picture is better for this text?"},
}
"""What is asked in each task, by the name of the question in files and results."""

CHOICES: dict[str, tuple[str, ...]] = {"grades": GRADES, "pairs": SIDES}


class Picture(NamedTuple):
    """A picture of a plan.

    Args:
        source: Number of its source.
        sample: Number of the evaluation sample.
        sum: SHA-256 of its pixels.
    """

    source: int
    sample: int
    sum: str


class Item(NamedTuple):
    """What is shown at once: one picture to grade, or two to compare.

    Args:
        prompt: Prompt of the pictures.
        pictures: One picture, or two of different sources.
    """

    prompt: str
    pictures: tuple[Picture, ...]


class Plan(NamedTuple):
    """All that is settled before the first answer.

    Args:
        task: Either `grades` or `pairs`.
        seed: Number from which order and sides follow.
        num_raters: Number of raters that are to answer each item.
        sources: Names of the sources.
        items: What is shown; each rater sees it in an order of their own.
    """

    task: Task
    seed: int
    num_raters: int
    sources: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def questions(self) -> dict[str, str]:
        """What is asked of each item, by name."""
        return QUESTIONS[self.task]

    @property
    def num_answers(self) -> int:
        """Number of answers that are wanted."""
        return len(self.items) * len(self.questions) * self.num_raters

    def order(self, rater: str) -> list[int]:
        """The numbers of the items in the order in which a rater sees them.

        Every prompt comes once, in random order, before one comes again, so that pictures of one prompt are far apart.
        """
        chance = random.Random(f"{self.seed} order {rater}")  # not the global generator; text is hashed alike anywhere
        by_prompt: dict[str, list[int]] = {}
        for number in chance.sample(range(len(self.items)), len(self.items)):
            by_prompt.setdefault(self.items[number].prompt, []).append(number)
        found: list[int] = []
        for turn in range(max(map(len, by_prompt.values()))):
            now = [own[turn] for own in by_prompt.values() if turn < len(own)]
            found += chance.sample(now, len(now))
        return found

    def on_sides(self, rater: str, item: int) -> tuple[Picture, ...]:
        """The pictures of an item from left to right, as a rater sees them."""
        own = self.items[item].pictures
        is_turned = random.Random(f"{self.seed} side {rater} {item}").random() < 0.5
        return own[::-1] if is_turned else own


def make_plan(
    sources: Sequence[Source], task: Task, num_raters: int, seed: int = 0, num_prompts: int | None = None
) -> Plan:
    """The plan of a study.

    Args:
        sources: Whose pictures are shown, two or more.
        task: Either `grades`, one picture at a time, or `pairs`, two of the same prompt.
        num_raters: Number of raters that are to answer each item.
        seed: Number from which the chosen prompts, the order and the sides follow.
        num_prompts: Number of prompts, of which a random choice is shown; None: all that every source has drawn.

    Raises:
        ValueError: if sources share too few prompts, or a picture is missing, damaged or of another size.
    """
    if len(sources) < 2:
        raise ValueError(f"rate has {len(sources)} run: name two or more, or two checkpoints of one")
    shared = [place for place in sources[0].pictures if all(place in own.pictures for own in sources)]
    prompts = list(dict.fromkeys(prompt for prompt, _ in shared))
    if len(prompts) < (num_prompts or 1):
        wanted = f"num_prompts is {num_prompts}" if prompts else "nothing can be compared"
        raise ValueError(f"{len(prompts)} prompts have pictures of every run; {wanted}: name runs of one prompt file")
    if num_prompts is not None:
        chosen = set(random.Random(f"{seed} prompts").sample(prompts, num_prompts))
        shared = [place for place in shared if place[0] in chosen]
    items: list[Item] = []
    for place in shared:
        pictures = _pictures(sources, place)
        groups = combinations(pictures, 2) if task == "pairs" else ((own,) for own in pictures)
        items += (Item(place[0], group) for group in groups)
    return Plan(task, seed, num_raters, tuple(own.name for own in sources), tuple(items))


def _pictures(sources: Sequence[Source], place: Place) -> list[Picture]:
    found, sizes = [], {}
    for number, source in enumerate(sources):
        shown = source.pictures[place]
        picture = picture_if_whole(shown.path)
        if picture is None:
            raise ValueError(f"picture {shown.path} is missing or damaged: draw it again, or name another step")
        sizes[picture.size] = shown.path
        found.append(Picture(number, shown.sample, hashlib.sha256(picture.tobytes()).hexdigest()))
    if len(sizes) > 1:
        told = " and ".join(f"{path} {width} x {height}" for (width, height), path in sizes.items())
        raise ValueError(f"pictures of one prompt differ in size, by which raters would know them: {told}")
    return found


def settle(path: Path, plan: Plan) -> None:
    """Write a plan, or find the same in its file.

    Raises:
        ValueError: naming the first difference, if the file holds another plan or cannot be read.
    """
    wanted = _as_json(plan)
    if not path.is_file():
        with complete_or_absent(path) as partial:
            partial.write_text(strict_json(wanted, 1) + "\n", encoding="utf-8")
        return
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in wanted if found[name] != wanted[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"plan {path} cannot be read: name another folder with --output") from error
    cure = "give the settings and runs that it was begun with, or name another folder with --output"
    if changed:
        name = changed[0]
        told = f"{name} is {found[name]} there and {wanted[name]} here" if name != "items" else "other pictures"
        raise ValueError(f"plan {path} was settled before, and is another now ({told}): {cure}")


def _as_json(plan: Plan) -> dict[str, Any]:
    items = [{"prompt": own.prompt, "pictures": [picture._asdict() for picture in own.pictures]} for own in plan.items]
    head = {"version": VERSION, "task": plan.task, "seed": plan.seed, "num_raters": plan.num_raters}
    return {**head, "sources": list(plan.sources), "questions": plan.questions, "items": items}
