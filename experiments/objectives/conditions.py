"""All conditions beside each other: the judge against the strength of what differs, and where rows cross."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.objectives.claims import at_end
from experiments.objectives.plan import Condition
from experiments.objectives.results import Results, concept_of, difference, last_of, with_half
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.markdown import markdown_table

FEW_SEEDS = 3
OF_A_STRENGTH = ("saturation", "drift")  # beside the judge, the wanted label and the concept


def write_conditions(
    conditions: Mapping[str, Condition],
    results: Mapping[str, Results],
    label: str,
    references: Sequence[str],
    folder: Path,
) -> str:
    """Write `conditions.md` and `conditions.png`; returns the former.

    Args:
        conditions: Conditions by name.
        results: Curves of each row under each of them.
        label: Label that is wanted.
        references: Rows that every other one is compared with.
        folder: Folder of the report.
    """
    found = {name: rows for name, rows in results.items() if rows}
    columns = ["judge", f"share/{label}", concept_of(next(iter(found.values()))) or "prompt", *OF_A_STRENGTH]
    parts = [f"{name} at the end:\n\n{table(found, name)}" for name in columns]
    parts += [
        f"{own}, less each row, on the judge (above 0: it is better); the strength at which the lines cross:\n\n"
        + comparison(conditions, found, own)
        for own in references
        if any(own in rows for rows in found.values())
    ]
    text = "\n\n".join(parts) + "\n"
    with complete_or_absent(folder / "conditions.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return text + draw(conditions, found, columns, folder / "conditions.png")


def rows_of(results: Mapping[str, Results]) -> list[str]:
    """All rows, in the order in which they come."""
    return list(dict.fromkeys(row for rows in results.values() for row in rows))


def table(results: Mapping[str, Results], number: str) -> str:
    """A number at the end of each row under each condition, means over seeds with half the 95 % interval."""
    lines = [
        [row, *(with_half(last_of(rows[row], number)) if row in rows else "" for rows in results.values())]
        for row in rows_of(results)
    ]
    return markdown_table(["", *results], lines)


def comparison(conditions: Mapping[str, Condition], results: Mapping[str, Results], reference: str) -> str:
    """The judge of a row less that of each other one, seed by seed, and the strength from which it is ahead."""
    lines = []
    for row in rows_of(results):
        gaps = {
            name: difference(rows[reference], rows[row], at_end("judge"))
            for name, rows in results.items()
            if row != reference and row in rows and reference in rows
        }
        if gaps:
            points = sorted(
                (strength, gap.value)
                for name, gap in gaps.items()
                if (strength := conditions[name].strength) is not None
            )
            cells = [with_half(gaps[name], sign="+") if name in gaps else "" for name in results]
            lines.append([row, *cells, crossing(points)])
    return markdown_table(["", *results, "ahead from"], lines)


def crossing(points: Sequence[tuple[float, float]]) -> str:
    """Where (strength, gap) rises through 0 for good, on the straight line between points, in words."""
    if not points:
        return ""
    if points[-1][1] <= 0:
        return "nowhere"
    for (left, low), (right, high) in reversed(list(pairwise(points))):
        if low <= 0:
            return f"{left - low * (right - left) / (high - low):.2g}"
    return "the start"


def draw(
    conditions: Mapping[str, Condition], results: Mapping[str, Results], columns: Sequence[str], path: Path
) -> str:
    """Write the figure; returns a line that says where it is. Conditions without a strength stand at its right."""
    if find_spec("matplotlib") is None:
        return "no figure: pip install -e '.[notebooks]' brings matplotlib, then add --report_only true"
    import matplotlib.pyplot as plt  # not every installation has it

    known = sorted(
        (name for name in results if conditions[name].strength is not None),
        key=lambda name: conditions[name].strength or 0.0,
    )
    places: dict[str, float] = {name: conditions[name].strength or 0.0 for name in known}
    last = max(places.values(), default=0.0)
    places |= {name: last + 1 + i for i, name in enumerate(name for name in results if name not in places)}
    figure, axes = plt.subplots(1, len(columns), figsize=(4.4 * len(columns), 4.6), layout="constrained")
    colours = plt.colormaps["tab10"]
    for number, axis in zip(columns, axes, strict=True):
        for place, row in enumerate(rows_of(results)):
            style = {"color": "black" if row == "base" else colours(place % 10), "capsize": 2}
            for part, line in ((known, "-"), ([name for name in places if name not in known], "")):
                own = [name for name in part if row in results[name]]
                of_row = [(places[name], last_of(results[name][row], number)) for name in own]
                are_few = [len(results[name][row]) < FEW_SEEDS for name in own]  # whose bars would hide all others
                whole: dict[str, Any] = {"label": row} if part is known else {}
                axis.errorbar(
                    [x + 0.02 * (place - 4) for x, _ in of_row],
                    [value.value for _, value in of_row],
                    yerr=[
                        value.half if value.is_known and not few else 0.0
                        for (_, value), few in zip(of_row, are_few, strict=True)
                    ],
                    marker="o",
                    markersize=3,
                    linestyle=line,
                    **style,
                    **whole,
                )
        axis.set_title(number)
        axis.set_xticks(list(places.values()), list(places), rotation=30)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    with complete_or_absent(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    return f"all conditions: {path}"
