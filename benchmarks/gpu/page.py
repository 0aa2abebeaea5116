"""The results on one page of Markdown."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import FAILED, LATE, NOT_REACHED, PASSED
from srpo_lightning.files.markdown import Markdown, code, markdown_table
from srpo_lightning.jobs.estimate.units import GIB

BYTES = ("peak", "states", "beside", "highest memory of the process", "files in 4 bits", "optimizer states", "weights")
"""Names of numbers that are in bytes."""

LEFT_OUT = ("state", "seconds", "passed")


def page(results: Mapping[str, Any]) -> str:
    """All of it.

    Args:
        results: As `benchmarks.gpu` writes them: machine, verdict, and parts by name.
    """
    return "\n".join(line for block in blocks(results) for line in (block, "")).rstrip() + "\n"


def blocks(results: Mapping[str, Any]) -> Iterator[str]:
    """Heading, verdict, machine, the list of parts, and each part's tables."""
    yield f"# {results['machine'].get('device', 'unknown device')}: {results['verdict']}"
    yield machine_line(results)
    rows = [[name, found["state"], f"{found['seconds']:.0f}"] for name, found in results["parts"].items()]
    yield markdown_table(["part", "result", "seconds"], rows)
    for name, found in results["parts"].items():
        if found["state"] != NOT_REACHED:
            yield f"## {name}: {found['state']}"
            yield PARTS[name].shows
            yield from tables(name, found)


def verdict(parts: Mapping[str, Any]) -> str:
    """What all checks say together, with what is missing named."""
    counts = Counter(own["state"] for own in parts.values())
    said = f"{counts[PASSED]} of {counts[PASSED] + counts[FAILED]} checks passed"
    for state in (FAILED, LATE, NOT_REACHED):
        names = [name for name, own in parts.items() if own["state"] == state]
        said += f"; {state}: {', '.join(names)}" if names else ""
    return said


def machine_line(results: Mapping[str, Any]) -> str:
    """The machine and the versions, in a sentence each."""
    own = dict(results["machine"])
    versions = ", ".join(f"{name} {number}" for name, number in own.pop("versions", {}).items())
    told = "; ".join(f"{name} {in_words(name, number)}" for name, number in own.items())
    return f"{told}.\n{versions}.\nModels: {results['size']}; weights are random."


def tables(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Those of a part, as far as it came."""
    if "error" in found:
        yield str(found["error"])
        found = {key: own for key, own in found.items() if key != "error"}
    if not found.keys() - set(LEFT_OUT):
        return
    if name.startswith(("correctness", "cuDNN attention")):
        yield differences_table(found["rows"])
    elif name.startswith("memory"):
        yield peaks_table(found)
    else:
        yield from nested(found)


def differences_table(rows: list[Mapping[str, Any]]) -> str:
    """Each difference beside what is allowed."""
    names = list(rows[0]["allowed"])

    def cells(row: Mapping[str, Any]) -> Iterator[object]:
        yield from (row["trained"], row["numbers"], code(row["attention"]))
        if "error" in row:
            yield from (shortened(row["error"]), *[""] * (len(names) - 1))
        else:
            yield from (f"{row['measured'][name]:.2g} / {row['allowed'][name]:.2g}" for name in names)
        yield {True: "yes", False: Markdown("**no**"), None: "does not run"}[row["passed"]]

    return markdown_table(["trained", "numbers", "attention", *names, "right"], map(list, map(cells, rows)))


def shortened(message: str) -> str:
    """An error as a cell has room for it; the numbers have it whole."""
    return textwrap.shorten(message, 90, placeholder=" ...")


def peaks_table(found: Mapping[str, Any]) -> str:
    """Peaks by phase, the highest last."""
    rows = [
        [phase, gib(size), gib(found["measured"].get(phase)), ratio(size, found["measured"].get(phase))]
        for phase, size in found["predicted"].items()
    ]
    if "ratio" in found:
        highest = [max(found[name].values()) for name in ("predicted", "measured")]
        rows.append(["highest", *map(gib, highest), ratio(*highest)])
    table = markdown_table(["phase", "predicted GiB", "measured GiB", "predicted / measured"], rows)
    told = [
        f"{name} {gib(found[name])} GiB"
        for name in ("weights", "optimizer states", "reserved", "used")
        if name in found
    ]
    told += [f"out of memory {found['out of memory']}"] if "out of memory" in found else []
    return "\n\n".join([table, "; ".join(told) + "."])


def gib(size: float | None) -> str:
    """Bytes as GiB; nothing for what is not there."""
    return "" if size is None else f"{size / GIB:.2f}"


def ratio(predicted: float, measured: float | None) -> str:
    """To three decimals."""
    return f"{predicted / measured:.3f}" if measured else ""


def nested(found: Mapping[str, Any]) -> Iterator[str]:
    """Any part's numbers: a table for mappings of mappings, a line for the rest."""
    single = {name: own for name, own in found.items() if not isinstance(own, Mapping) and name not in LEFT_OUT}
    groups = {name: own for name, own in found.items() if isinstance(own, Mapping)}
    flat = {name: own for name, own in groups.items() if not any(isinstance(cell, Mapping) for cell in own.values())}
    if flat:
        yield rows_table("", flat)
    for name, rows in groups.items():
        if name not in flat:
            yield rows_table(name, rows)
    if single:
        yield "; ".join(f"{name} {in_words(name, own)}" for name, own in single.items()) + "."


def rows_table(head: str, rows: Mapping[str, Any]) -> str:
    """One row per name; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(in_words(c, row[c]) if c in row else "" for c in columns)] for name, row in rows.items()]
    return markdown_table([head, *columns], body)


def in_words(name: str, value: Any) -> str:
    """A number as a person reads it, by its name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not finite"
    if name in BYTES or name.startswith("memory of"):
        return f"{value / GIB:.3g} GiB"
    if name in ("share", "of the matrix rate"):
        return f"{value:.1%}"
    if name == "model FLOPs":
        return f"{value:.3g}"
    if name == "matrix rate":
        return f"{value / 1e12:.3g} TFLOP/s"
    if name == "error":
        return shortened(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
