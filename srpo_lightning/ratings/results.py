"""What the answers say: of each source, between sources, between raters."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from srpo_lightning.evaluation.metrics import Interval
from srpo_lightning.ratings.answers import Answer
from srpo_lightning.ratings.plan import CHOICES, GRADES, Plan
from srpo_lightning.ratings.statistics import agreement, share, strengths_with_intervals


class Comparison(NamedTuple):
    """One rater's preference between two pictures of a prompt, asked for or following from two grades.

    Args:
        prompt: Number of the prompt.
        rater: Name of the rater.
        first: Number of a source.
        second: Number of another one, above `first`.
        outcome: 1 if the first was preferred, 0 if the second, 1/2 if they are alike.
        samples: Numbers of the evaluation samples of both.
    """

    prompt: int
    rater: str
    first: int
    second: int
    outcome: float
    samples: tuple[int, int]


class Win(NamedTuple):
    """How often one source was preferred to another.

    Args:
        first: Name of a source.
        second: Name of the other.
        rate: Share of comparisons that the first won; ties count half.
        ties: Share of ties.
        comparisons: Number of comparisons.
    """

    first: str
    second: str
    rate: Interval
    ties: float
    comparisons: int


class Judged(NamedTuple):
    """What was answered to one question.

    Args:
        shares: Share of each grade by source; empty of pairs.
        wins: Win rates of all pairs of sources.
        strengths: Bradley-Terry strength of each source.
        alpha: Krippendorff's alpha: ordinal of grades, nominal of pairs.
    """

    shares: dict[str, dict[str, Interval]]
    wins: list[Win]
    strengths: dict[str, Interval]
    alpha: Interval


def prompts_of(plan: Plan) -> list[int]:
    """The number of each item's prompt."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(item.prompt, len(numbers)) for item in plan.items]


def judged(plan: Plan, answers: Iterable[Answer]) -> dict[str, Judged]:
    """What was answered, by question."""
    given = list(answers)
    found = {}
    for question in plan.questions:
        own = [answer for answer in given if answer.question == question]
        compared = list(comparisons(plan, own))
        found[question] = Judged(
            shares(plan, own) if plan.task == "grades" else {},
            list(wins(plan, compared)),
            bradley_terry(plan, compared),
            between_raters(plan, own),
        )
    return found


def comparisons(plan: Plan, answers: Sequence[Answer]) -> Iterator[Comparison]:
    """The preferences in the answers to one question."""
    prompts = prompts_of(plan)
    if plan.task == "pairs":
        for own in answers:
            first, second = plan.items[own.item].pictures
            value = {"left": 1.0, "equal": 0.5, "right": 0.0}[own.value]
            outcome = value if own.left == first.source else 1 - value
            yield Comparison(
                prompts[own.item], own.rater, first.source, second.source, outcome, (first.sample, second.sample)
            )
        return
    places = same_place(plan)
    graded: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for own in answers:
        graded[own.rater, places[own.item]].append(own)
    for (rater, _), group in graded.items():
        ordered = sorted(group, key=lambda own: plan.items[own.item].pictures[0].source)
        for one, other in combinations(ordered, 2):
            first, second = (plan.items[own.item].pictures[0] for own in (one, other))
            difference = GRADES.index(one.value) - GRADES.index(other.value)
            outcome = 0.5 + 0.5 * np.sign(difference)
            samples = (first.sample, second.sample)
            yield Comparison(prompts[one.item], rater, first.source, second.source, float(outcome), samples)


def same_place(plan: Plan) -> list[int]:
    """For each item of one picture a number that it shares with the other sources' picture of the same place."""
    seen: Counter[tuple[str, int]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    found = []
    for item in plan.items:
        source = item.pictures[0].source
        place = item.prompt, seen[item.prompt, source]
        seen[item.prompt, source] += 1
        found.append(numbers.setdefault(place, len(numbers)))
    return found


def shares(plan: Plan, answers: Sequence[Answer]) -> dict[str, dict[str, Interval]]:
    """The share of each grade, the best first, by source."""
    prompts = prompts_of(plan)
    found = {}
    for number, name in enumerate(plan.sources):
        own = [answer for answer in answers if plan.items[answer.item].pictures[0].source == number]
        groups = np.array([prompts[answer.item] for answer in own])
        found[name] = {
            grade: share(np.array([float(one.value == grade) for one in own]), groups) for grade in reversed(GRADES)
        }
    return found


def wins(plan: Plan, compared: Sequence[Comparison]) -> Iterator[Win]:
    """The win rate of every pair of sources that were compared."""
    for first, second in combinations(range(len(plan.sources)), 2):
        own = [one for one in compared if (one.first, one.second) == (first, second)]
        if own:
            outcomes = np.array([one.outcome for one in own])
            rate = share(outcomes, np.array([one.prompt for one in own]))
            ties = float((outcomes == 0.5).mean())
            yield Win(plan.sources[first], plan.sources[second], rate, ties, len(own))


def bradley_terry(plan: Plan, compared: Sequence[Comparison]) -> dict[str, Interval]:
    """The Bradley-Terry strength of each source; one that was not compared has none (NaN)."""
    places = {prompt: place for place, prompt in enumerate(sorted({one.prompt for one in compared}))}
    won = np.zeros((max(1, len(places)), len(plan.sources), len(plan.sources)))
    for one in compared:
        won[places[one.prompt], one.first, one.second] += one.outcome
        won[places[one.prompt], one.second, one.first] += 1 - one.outcome
    return dict(zip(plan.sources, strengths_with_intervals(won), strict=True))


def between_raters(plan: Plan, answers: Sequence[Answer]) -> Interval:
    """Krippendorff's alpha of the answers to one question.

    Which picture of a pair is called the first is arbitrary, so each pair is a unit in both directions. Otherwise
    raters who all prefer one source would agree no more than chance does that knows that source.
    """
    choices, prompts = CHOICES[plan.task], np.array(prompts_of(plan))
    counts = np.zeros((len(plan.items), len(choices)), dtype=int)
    for own in answers:
        value = choices.index(own.value)
        is_turned = plan.task == "pairs" and own.left != plan.items[own.item].pictures[0].source
        counts[own.item, len(choices) - 1 - value if is_turned else value] += 1
    if plan.task == "grades":
        return agreement(counts, prompts, "ordinal")
    return agreement(np.concatenate([counts, counts[:, ::-1]]), np.concatenate([prompts, prompts]), "nominal")
