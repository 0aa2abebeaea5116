"""Which reward to trust: how far the scores that runs have logged agree with people."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from srpo_lightning.evaluation.comparison import NOT_WON
from srpo_lightning.evaluation.metrics import Interval
from srpo_lightning.ratings.answers import Answer
from srpo_lightning.ratings.plan import GRADES, Plan
from srpo_lightning.ratings.results import Comparison, comparisons, prompts_of
from srpo_lightning.ratings.sources import Source
from srpo_lightning.ratings.statistics import rank_correlation, resampled, share
from srpo_lightning.report.comparison_page import definition
from srpo_lightning.report.configuration import read_configuration


class Trust(NamedTuple):
    """How far a score agrees with people.

    Args:
        accuracy: Share of people's preferences that the score has too; ties of people are left out, of the score half.
        correlation: Spearman's rank correlation of the score with what people said.
        preferences: Number of preferences.
    """

    accuracy: Interval
    correlation: Interval
    preferences: int


class Scores(NamedTuple):
    """The scores of all pictures that are shown.

    Args:
        by_name: Scores by their name, then by source and evaluation sample.
        left_out: Reasons why scores of a name are not compared, by name.
    """

    by_name: dict[str, dict[tuple[int, int], float]]
    left_out: dict[str, str]


def logged_scores(plan: Plan, sources: Sequence[Source]) -> Scores:
    """The scores that runs have logged of the pictures that are shown.

    Raises:
        ValueError: naming the file, if the configuration of a run cannot be read.
    """
    shown = {(picture.source, picture.sample) for item in plan.items for picture in item.pictures}
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for number, source in enumerate(sources):
        for picture in source.pictures.values():
            if (number, picture.sample) in shown:
                for name, value in picture.scores.items():
                    found[name][number, picture.sample] = value
    settings = {own.run.path: read_configuration(own.run)[1] for own in sources}
    left_out = {}
    for name in [own for own in found if own not in NOT_WON]:
        if found[name].keys() != shown:
            left_out[name] = f"{len(shown) - len(found[name])} of {len(shown)} pictures have none"
        elif any(definition(own, name) != definition(settings[sources[0].run.path], name) for own in settings.values()):
            left_out[name] = "runs measure it by other rewards, judges or forms"
    kept = {name: own for name, own in found.items() if name not in NOT_WON and name not in left_out}
    return Scores(kept, left_out)


def trust(plan: Plan, answers: Sequence[Answer], scores: Scores) -> dict[str, dict[str, Trust]]:
    """How far each score agrees with people, by question and by the score's name."""
    found = {}
    for question in plan.questions:
        own = [answer for answer in answers if answer.question == question]
        compared = list(comparisons(plan, own))
        found[question] = {name: _trust(plan, own, compared, values) for name, values in scores.by_name.items()}
    return found


def _trust(
    plan: Plan,
    answers: Sequence[Answer],
    compared: Sequence[Comparison],
    values: Mapping[tuple[int, int], float],
) -> Trust:
    differences = [values[one.first, one.samples[0]] - values[one.second, one.samples[1]] for one in compared]
    preferred = [(one, own) for one, own in zip(compared, differences, strict=True) if one.outcome != 0.5]
    is_right = np.array([0.5 + 0.5 * np.sign(own) * (2 * one.outcome - 1) for one, own in preferred])
    groups = np.array([one.prompt for one, _ in preferred])
    nothing = Interval(np.nan, np.nan, np.nan)
    accuracy = share(is_right, groups) if preferred else nothing
    if plan.task == "grades":
        said, scored, prompts = _by_picture(plan, answers, values)
    else:
        said, scored, prompts = _by_pair(compared, differences)
    correlation = resampled(
        rank_correlation(said, scored), prompts, lambda rows: rank_correlation(said[rows], scored[rows])
    )
    return Trust(accuracy, correlation, len(preferred))


def _by_picture(
    plan: Plan, answers: Sequence[Answer], values: Mapping[tuple[int, int], float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean grade of each picture, its score, and its prompt."""
    grades: dict[int, list[int]] = defaultdict(list)
    for own in answers:
        grades[own.item].append(GRADES.index(own.value))
    prompts = prompts_of(plan)
    said = np.array([np.mean(own) for own in grades.values()])
    pictures = [plan.items[item].pictures[0] for item in grades]
    scored = np.array([values[own.source, own.sample] for own in pictures])
    return said, scored, np.array([prompts[item] for item in grades])


def _by_pair(compared: Sequence[Comparison], differences: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean preference in each pair, the difference of scores, and the prompt; each pair in both directions."""
    outcomes: dict[tuple[int, int, tuple[int, int]], list[float]] = defaultdict(list)
    scored: dict[tuple[int, int, tuple[int, int]], float] = {}
    prompts = {}
    for one, difference in zip(compared, differences, strict=True):
        key = one.first, one.second, one.samples
        outcomes[key].append(one.outcome - 0.5)
        scored[key], prompts[key] = difference, one.prompt
    said = np.array([np.mean(own) for own in outcomes.values()])
    score = np.array([scored[key] for key in outcomes])
    groups = np.array([prompts[key] for key in outcomes])
    return np.concatenate([said, -said]), np.concatenate([score, -score]), np.concatenate([groups, groups])
