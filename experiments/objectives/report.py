"""The table in Markdown and everything as JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.objectives.claims import Claim
from experiments.objectives.results import Curve, Results, concept_of, last_of, mean_over_seeds, with_half
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.markdown import Markdown, escaped, markdown_table
from srpo_lightning.files.provenance import software
from srpo_lightning.files.strict_json import strict_json

MIB = 2**20


class Report(NamedTuple):
    """What is written.

    Args:
        results: Curves of each row.
        sweeps: Curves of each row from the first seed at every learning rate.
        label: Label that is wanted.
        target: Score of the judge whose first time is shown.
        claims: Claims of the paper, and whether they hold.
    """

    results: Results
    sweeps: Results
    label: str
    target: float
    claims: Sequence[Claim]


def columns(report: Report) -> dict[str, Callable[[Sequence[Curve]], str]]:
    """What the table shows of the runs of a row."""
    numbers = {
        "training reward": "reward",
        "held-out judge": "judge",
        f"share of {report.label}": f"share/{report.label}",
        "concept top-5": concept_of(report.results) or "top5",
        "diversity": "diversity",
        "within a prompt": "prompt_diversity",
        "drift": "drift",
        "saturation": "saturation",
    }
    shown = {head: _number(name) for head, name in numbers.items()}
    return shown | {
        f"seconds to judge {report.target:g}": lambda curves: _seconds(curves, report.target),
        "seconds": lambda curves: _plain([curve.points[-1].seconds for curve in curves]),
        "peak MiB": lambda curves: _plain([c.peak_bytes / MIB for c in curves if c.peak_bytes]),
    }


def table(report: Report) -> str:
    """Means over seeds, with the half width of their 95 % interval."""
    heads = columns(report)
    rows = []
    for name, curves in report.results.items():
        rate = f"{curves[0].run.learning_rate:g}" if curves[0].run.steps else ""
        rows.append([name, rate, *(cell(curves) for cell in heads.values())])
    return markdown_table(["", "learning rate", *heads], rows)


def sweep_table(report: Report) -> str:
    """The judge at the end of each run of the sweep, the best of each row marked."""
    rates = sorted({curve.run.learning_rate for curves in report.sweeps.values() for curve in curves})
    rows = []
    for name, curves in report.sweeps.items():
        judged = {curve.run.learning_rate: curve.last["judge"] for curve in curves}
        best = max(judged, key=judged.__getitem__)
        cells = [
            "" if rate not in judged else Markdown(f"**{judged[rate]:.3f}**") if rate == best else f"{judged[rate]:.3f}"
            for rate in rates
        ]
        rows.append([name, *cells])
    return markdown_table(["judge at the end", *(f"{rate:g}" for rate in rates)], rows)


def markdown(report: Report) -> str:
    """The tables, and the claims between them."""
    seeds = max(len(curves) for curves in report.results.values())
    claims = "\n".join(
        f"{i}. **{c.verdict}**: {escaped(c.text)}. {escaped(c.evidence)}" for i, c in enumerate(report.claims, 1)
    )
    return (
        f"{table(report)}\n\nMean over {seeds} seeds +- half the 95 % interval (Student's t). `seconds` are those of "
        f"training steps.\n\n{claims}\n\nLearning rates, tried from one seed:\n\n{sweep_table(report)}\n"
    )


def write(report: Report, folder: Path) -> str:
    """Write `table.md` and `results.json`; returns the former."""
    text = markdown(report)
    content = {
        "software": software(),
        "label": report.label,
        "target": report.target,
        "means": {name: means(curves) for name, curves in report.results.items()},
        "rows": {name: [as_dict(curve) for curve in curves] for name, curves in report.results.items()},
        "sweeps": {name: [as_dict(curve) for curve in curves] for name, curves in report.sweeps.items()},
        "claims": [claim._asdict() for claim in report.claims],
    }
    for name, body in (("table.md", text), ("results.json", strict_json(content, 1))):
        with complete_or_absent(folder / name) as partial:
            partial.write_text(body, encoding="utf-8")
    return text


def means(curves: Sequence[Curve]) -> dict[str, dict[str, float]]:
    """Every number at the end over the seeds, for JSON."""
    return {name: last_of(curves, name)._asdict() for name in curves[0].last}


def as_dict(curve: Curve) -> dict[str, Any]:
    """A curve for JSON."""
    run = curve.run
    return {
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "folder": str(run.folder),
        "steps": run.steps,
        "forwards_per_step": run.forwards,
        "peak_bytes": curve.peak_bytes,
        "points": [{"forwards": p.forwards, "seconds": p.seconds, **p.numbers} for p in curve.points],
    }


def _number(name: str) -> Callable[[Sequence[Curve]], str]:
    return lambda curves: with_half(last_of(curves, name)) if name in curves[0].last else ""


def _plain(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.0f}" if values and sum(values) else ""


def _seconds(curves: Sequence[Curve], target: float) -> str:
    if not curves[0].run.steps:
        return ""
    reached = [seconds for curve in curves if (seconds := curve.reaches("judge", target)) is not None]
    if not reached:
        return "never"
    missed = len(curves) - len(reached)
    return with_half(mean_over_seeds(reached), 0) + (f" ({missed} never)" if missed else "")
