"""Whose turn is what: the next question for a rater, and what is still missing."""

from collections import Counter
from typing import NamedTuple

from srpo_lightning.ratings.answers import Answer, Answers, Slot
from srpo_lightning.ratings.plan import CHOICES, Picture, Plan


class Turn(NamedTuple):
    """What a rater is asked now.

    Args:
        number: Place of the question in the rater's own order, from 0; it tells nothing about whose pictures are shown.
        item: Number of the item.
        question: Name of the question.
        pictures: Pictures from left to right.
        done: Number of questions that the rater has answered.
        left: Number of questions that the rater has still before them, this one among them.
    """

    number: int
    item: int
    question: str
    pictures: tuple[Picture, ...]
    done: int
    left: int


class Study:
    """A plan and its answers.

    Args:
        plan: What is shown, and how many answers are wanted.
        answers: What was answered so far.

    Raises:
        ValueError: if an answer is to something that the plan does not hold.
    """

    def __init__(self, plan: Plan, answers: Answers) -> None:
        self.plan = plan
        self.answers = answers
        for own in answers:
            known = own.item in range(len(plan.items)) and own.question in plan.questions
            sources = {picture.source for picture in plan.items[own.item].pictures} if known else set()
            if own.left not in sources or own.value not in CHOICES[plan.task]:
                raise ValueError(f"{answers.file(own.rater)} answers what the plan does not ask: take it away")

    def turn(self, rater: str) -> Turn | None:
        """What a rater is asked now; None at the end.

        An item that enough others have answered is passed over, unless the rater has begun with it.
        """
        own = self.answers.of(rater)
        full = self._answered_by_enough_others(rater)
        begun = {item for item, _ in own}
        asked = [
            (number, (item, question))
            for number, (item, question) in enumerate(self._slots(rater))
            if (item, question) not in own and (item in begun or item not in full)
        ]
        if not asked:
            return None
        number, (item, question) = asked[0]
        return Turn(number, item, question, self.plan.on_sides(rater, item), len(own), len(asked))

    def answer(self, rater: str, number: int, value: str) -> bool:
        """Keep the answer to the question at a place of the rater's order.

        Returns:
            Whether it was kept: not where the rater has answered it already, in another window.
        """
        slots = self._slots(rater)
        if number not in range(len(slots)) or value not in CHOICES[self.plan.task]:
            return False
        item, question = slots[number]
        left = self.plan.on_sides(rater, item)[0].source
        return self.answers.add(Answer(rater, item, question, value, left))

    def missing(self) -> int:
        """Number of answers that are still missing."""
        given = Counter((own.item, own.question) for own in self.answers)
        wanted = self.plan.num_raters
        slots = [(item, question) for item in range(len(self.plan.items)) for question in self.plan.questions]
        return sum(max(0, wanted - given[slot]) for slot in slots)

    def check_complete(self) -> None:
        """Refuse results that would come too early.

        Raises:
            ValueError: telling how many answers are missing.
        """
        if missing := self.missing():
            raise ValueError(
                f"{missing} of {self.plan.num_answers} planned answers are missing: results are shown when all are "
                "there, so that nobody stops when they please"
            )

    def _slots(self, rater: str) -> list[Slot]:
        return [(item, question) for item in self.plan.order(rater) for question in self.plan.questions]

    def _answered_by_enough_others(self, rater: str) -> set[int]:
        answered = Counter((own.rater, own.item) for own in self.answers if own.rater != rater)
        whole = [item for (_, item), count in answered.items() if count == len(self.plan.questions)]
        return {item for item, raters in Counter(whole).items() if raters >= self.plan.num_raters}
