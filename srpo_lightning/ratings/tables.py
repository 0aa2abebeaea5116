"""Results as a text to read and as numbers for programs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from srpo_lightning.evaluation.metrics import FEW_GROUPS, Interval
from srpo_lightning.files.markdown import markdown_table
from srpo_lightning.ratings.plan import GRADES, Plan
from srpo_lightning.ratings.results import Judged, prompts_of
from srpo_lightning.ratings.trust import Trust


class Results(NamedTuple):
    """All that a study says.

    Args:
        plan: What was shown.
        num_answers: Number of answers by rater.
        judged: What was answered, by question.
        trust: How far each logged score agrees with people, by question and name.
        left_out: Reasons why scores are not compared, by name.
    """

    plan: Plan
    num_answers: Mapping[str, int]
    judged: Mapping[str, Judged]
    trust: Mapping[str, Mapping[str, Trust]]
    left_out: Mapping[str, str]


def as_json(results: Results) -> dict[str, Any]:
    """The results for `strict_json`; what is not known is NaN, which it writes as null."""
    return {
        "task": results.plan.task,
        "sources": list(results.plan.sources),
        "answers": dict(results.num_answers),
        "questions": {
            question: plain(own) | {"rewards": plain(results.trust[question])}
            for question, own in results.judged.items()
        },
        "left_out": dict(results.left_out),
    }


def plain(value: Any) -> Any:
    """Nested tuples with names as nested mappings."""
    if hasattr(value, "_asdict"):
        return {name: plain(own) for name, own in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(own) for name, own in value.items()}
    return [plain(own) for own in value] if isinstance(value, list) else value


def text(results: Results) -> str:
    """The results in Markdown."""
    plan = results.plan
    num_prompts = len(set(prompts_of(plan)))
    parts = [
        f"# What {len(results.num_answers)} raters say of {num_prompts} prompts",
        f"{sum(results.num_answers.values())} answers. Brackets hold 95 % intervals over prompts.",
    ]
    if num_prompts < FEW_GROUPS:
        parts.append(f"Intervals over {num_prompts} prompts are too narrow: show {FEW_GROUPS} or more.")
    for question, own in results.judged.items():
        parts += [f"## {question}: {plan.questions[question]}", *of_question(own)]
        if results.trust[question]:
            parts.append(rewards(results.trust[question]))
    parts += [f"`{name}` is not compared: {reason}." for name, reason in results.left_out.items()]
    if not results.left_out and not any(results.trust.values()):
        parts.append("No scores of these pictures were logged, so none is compared with people.")
    return "\n\n".join(parts) + "\n"


def of_question(judged: Judged) -> Iterator[str]:
    """The tables of one question."""
    if judged.shares:
        heads = ["share of grades", *reversed(GRADES)]
        rows = [[name, *(percent(own[grade]) for grade in heads[1:])] for name, own in judged.shares.items()]
        yield markdown_table(heads, rows)
    if judged.wins:
        heads = ["preferred", "to", "win rate", "ties", "comparisons"]
        won = [(own.first, own.second, percent(own.rate), f"{own.ties:.0%}", own.comparisons) for own in judged.wins]
        yield markdown_table(heads, won)
    heads = ["Bradley-Terry", "strength"]
    yield markdown_table(heads, [[name, number(own, "+.2f")] for name, own in judged.strengths.items()])
    yield f"Raters agree with each other by Krippendorff's alpha {number(judged.alpha, '.2f')}."


def rewards(found: Mapping[str, Trust]) -> str:
    """The table of scores, the best first by accuracy."""
    ordered = sorted(found.items(), key=lambda item: -nan_last(item[1].accuracy.value))
    rows = [[name, percent(own.accuracy), number(own.correlation, "+.2f"), own.preferences] for name, own in ordered]
    return markdown_table(["score", "has people's preference", "rank correlation", "preferences"], rows)


def nan_last(value: float) -> float:
    """A value to sort by."""
    return -math.inf if math.isnan(value) else value


def percent(interval: Interval) -> str:
    """A share with its bounds."""
    return number(interval, ".0%")


def number(interval: Interval, form: str) -> str:
    """A number with its bounds, as far as they are known."""
    if math.isnan(interval.value):
        return "unknown"
    bounds = f" ({interval.low:{form}} to {interval.high:{form}})" if interval.is_known else ""
    return f"{interval.value:{form}}{bounds}"
