"""What the paper claims, as statements about the table that hold or do not (arXiv 2509.06942).

A difference counts as shown where its interval over seeds does not hold zero.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.objectives.results import (
    Curve,
    Results,
    change_of,
    difference,
    mean_over_seeds,
    with_half,
)
from srpo_lightning.evaluation.metrics import Interval

OURS = "SRPO"
BASELINES = (
    "ReFL",
    "DRaFT-1",
    "DRaFT-LV",
    "DRTune",
    "LeapAlign",
    "FlowBP-Sparse",
    "FlowBP-Bridge",
    "FlowBP-Lagrange",
    "GRPO",
    "Direct-Align",
)
LATE = {"SRPO, late window": "SRPO", "Direct-Align, late window": "Direct-Align"}
COMBINED = {"LeapAlign, relative reward": "LeapAlign", "FlowBP-Lagrange, relative reward": "FlowBP-Lagrange"}
OTHERS = ("Direct-Align, other prompts", "LeapAlign, other prompts")
SMALL_FRACTION = 0.25
STEERED = 0.1
CLOSE = 0.8


class Claim(NamedTuple):
    """A statement.

    Args:
        text: Statement in words.
        verdict: Answer: yes, no, undecided (an interval holds zero), or not measured.
        evidence: Numbers that the answer rests on.
    """

    text: str
    verdict: str
    evidence: str


def claims(results: Results, labels: Sequence[str]) -> list[Claim]:
    """All claims of the paper; rows are known by the names that experiments/objectives/emoji.yaml gives them.

    Args:
        results: Curves of each row.
        labels: Labels that a picture can be steered to, each in a row `SRPO to <label>`, the first in `SRPO`.
    """
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("SRPO beats Direct-Align alone and every baseline on the held-out judge at equal compute",
         lambda: _best(results)),
        ("late windows are exploited (the training reward gains more than the judge, or diversity goes), the full one "
         "is not", lambda: _late(results)),
        ("without the inversion branch saturation drifts more", lambda: _inversion(results)),
        (f"SRPO reaches GRPO's best judge in at most {SMALL_FRACTION:.0%} of its compute", lambda: _grpo(results)),
        (f"swapping the words steers to each style (its share rises by {STEERED:.0%} or more)",
         lambda: _words(results, labels)),
        (f"real pictures bring at least {CLOSE:.0%} of what rollouts bring on the judge", lambda: _real(results)),
        ("the relative reward on LeapAlign's or FlowBP's estimator beats both them and SRPO on the judge",
         lambda: _combined(results)),
        ("with other prompts in the negative place an estimator beats SRPO and every baseline on the judge",
         lambda: _others(results)),
    ]  # fmt: skip
    return [Claim(text, *check()) for text, check in checks]


def _best(results: Results) -> tuple[str, str]:
    rivals = [name for name in BASELINES if name in results]
    if missing := _missing(results, [OURS, *rivals[:1]]) or (not rivals and "baselines"):
        return _not_measured(missing)
    gaps = {name: difference(results[OURS], results[name], at_end("judge")) for name in rivals}
    return _all(map(_sign, gaps.values())), "SRPO's judge less theirs: " + _list(gaps)


def _late(results: Results) -> tuple[str, str]:
    names = [name for pair in LATE.items() for name in pair]
    if missing := _missing(results, names):
        return _not_measured(missing)
    gaps = {
        f"{name} against {full}": difference(results[name], results[full], exploited) for name, full in LATE.items()
    }
    lost = {
        f"{name} against {full}": difference(results[full], results[name], at_end("diversity"))
        for name, full in LATE.items()
    }
    verdicts = [_any([_sign(gaps[key]), _sign(lost[key])]) for key in gaps]
    return _all(verdicts), (
        f"gain of the reward beyond the judge's, more than in the full window: {_list(gaps)}; "
        f"diversity lost, more than in the full window: {_list(lost)}"
    )


def _inversion(results: Results) -> tuple[str, str]:
    without = "SRPO, no inversion"
    if missing := _missing(results, [OURS, without]):
        return _not_measured(missing)
    more = difference(results[without], results[OURS], lambda c: abs(c.last["saturation"] - c.first["saturation"]))
    moved = {name: change_of(results[name], "saturation") for name in (OURS, without)}
    return _sign(more), f"saturation moved by {_list(moved)}; farther without it by {with_half(more, sign='+')}"


def _grpo(results: Results) -> tuple[str, str]:
    rivals = [name for name in results if name.startswith("GRPO")]
    if missing := _missing(results, [OURS]) or (not rivals and "GRPO"):
        return _not_measured(missing)
    parts, verdicts = [], []
    for name in rivals:
        for curve in results[name]:
            best = max(curve.points, key=lambda point: point.numbers["judge"])
            ours = next((c for c in results[OURS] if c.run.seed == curve.run.seed), None)
            spent = ours and ours.reaches("judge", best.numbers["judge"], "forwards")
            share = spent / best.forwards if spent and best.forwards else None
            verdicts.append("yes" if share is not None and share <= SMALL_FRACTION else "no")
            found = f"{share:.0%}" if share is not None else "never reached"
            parts.append(f"{name} from seed {curve.run.seed}: judge {best.numbers['judge']:.3f}, {found}")
    return _all(verdicts), "; ".join(parts)


def _words(results: Results, labels: Sequence[str]) -> tuple[str, str]:
    rows = {label: f"{OURS} to {label}" for label in labels[1:]} | {labels[0]: OURS}
    if missing := _missing(results, rows.values()):
        return _not_measured(missing)
    shares = {
        label: [(c.first[f"share/{label}"], c.last[f"share/{label}"]) for c in results[row]]
        for label, row in rows.items()
    }
    means = {
        label: tuple(sum(each) / len(pairs) for each in zip(*pairs, strict=True)) for label, pairs in shares.items()
    }
    rises = [mean_over_seeds([after - before - STEERED for before, after in pairs]) for pairs in shares.values()]
    return _all(map(_sign, rises)), ", ".join(
        f"{k} {before:.0%} to {after:.0%}" for k, (before, after) in means.items()
    )


def _real(results: Results) -> tuple[str, str]:
    real = "SRPO, real pictures"
    if missing := _missing(results, [OURS, real]):
        return _not_measured(missing)

    def gain(curve: Curve) -> float:
        return curve.last["judge"] - curve.first["judge"]

    less = difference(results[real], results[OURS], gain)
    enough = difference(results[real], results[OURS], gain, share=CLOSE)
    gains = {name: change_of(results[name], "judge") for name in (OURS, real)}
    share = gains[real].value / gains[OURS].value
    return _sign(enough), f"gains of the judge: {_list(gains)}, {share:.0%}; difference {with_half(less, sign='+')}"


def _combined(results: Results) -> tuple[str, str]:
    if missing := _missing(results, [OURS, *COMBINED, *COMBINED.values()]):
        return _not_measured(missing)
    gaps = {
        f"{name} less {other}": difference(results[name], results[other], at_end("judge"))
        for name, plain in COMBINED.items()
        for other in (plain, OURS)
    }
    pairs = [
        _all([_sign(gaps[f"{name} less {plain}"]), _sign(gaps[f"{name} less {OURS}"])])
        for name, plain in COMBINED.items()
    ]
    return _any(pairs), _list(gaps)


def _others(results: Results) -> tuple[str, str]:
    rivals = [name for name in (OURS, *BASELINES) if name in results]
    if missing := _missing(results, OTHERS) or (not rivals and OURS):
        return _not_measured(missing)
    gaps = {
        f"{name} less {rival}": difference(results[name], results[rival], at_end("judge"))
        for name in OTHERS
        for rival in rivals
    }
    each = [_all(_sign(gap) for key, gap in gaps.items() if key.startswith(f"{name} less")) for name in OTHERS]
    return _any(each), _list(gaps)


def exploited(curve: Curve) -> float:
    """How much more the training reward has gained than the judge."""
    return (curve.last["reward"] - curve.first["reward"]) - (curve.last["judge"] - curve.first["judge"])


def at_end(name: str) -> Callable[[Curve], float]:
    """A number at the end of a run."""
    return lambda curve: curve.last[name]


def _missing(results: Results, names: Iterable[str]) -> str:
    return ", ".join(name for name in names if name not in results)


def _not_measured(missing: str) -> tuple[str, str]:
    return "not measured", f"missing: {missing}"


def _sign(gap: Interval) -> str:
    """Whether a difference is above zero; of one seed there is no interval, and its sign decides."""
    if gap.low <= 0 <= gap.high:
        return "undecided"
    return "yes" if gap.value > 0 else "no"


def _all(verdicts: Iterable[str]) -> str:
    found = set(verdicts)
    return next((verdict for verdict in ("no", "undecided") if verdict in found), "yes")


def _any(verdicts: Iterable[str]) -> str:
    found = set(verdicts)
    return next((verdict for verdict in ("yes", "undecided") if verdict in found), "no")


def _list(intervals: dict[str, Interval]) -> str:
    return ", ".join(f"{name} {with_half(interval, sign='+')}" for name, interval in intervals.items())
