"""Evaluations of several weights beside each other, on the same prompts from the same noise."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file, save

from srpo_lightning.evaluation.metrics import (
    QUANTILES,
    Interval,
    Table,
    bootstrap_mean,
    cmmd,
    diversity,
    prompt_diversity,
    wins,
)
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.markdown import escaped, markdown_table
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.picture_statistics import STATISTICS

BASE = "base"
"""The name of the weights before training, beside `policy` and `ema`."""

HELD_OUT = "held_out"
"""The column with the one number to choose checkpoints by, of which training knows nothing."""

LABEL = "label"
"""The column with the number of the label that the judge finds an image most like."""

CONSISTENCY = "consistency"
"""The column with how much neighbouring frames of a clip are alike, where there are features of images."""

NOT_WON = (LABEL, CONSISTENCY, *(name for name, own in STATISTICS.items() if not own.is_compared))
"""Columns of which more is not better."""

HEADER = "table"
NO_SUM = b"00000000"
PLACE_OF_SUM = re.compile(rb'\\"crc32\\": \\"([0-9a-f]{8})\\"')
"""In the head of a table's file: the CRC-32 of the whole file, as it is with NO_SUM in this place."""


def by_tag(table: Table, tags: Sequence[Sequence[str]]) -> dict[str, Table]:
    """The rows of each tag, by its name, sorted.

    Args:
        tags: Tags of each prompt.
    """
    of_row = [tags[group] for group in table.groups.tolist()]
    names = sorted({tag for own in tags for tag in own})
    return {name: table.where(torch.tensor([name in own for own in of_row])) for name in names}


def are_paired(table: Table, base: Table | None) -> bool:
    """Whether both are of the same prompts and noise."""
    return base is not None and torch.equal(base.indices, table.indices)


def summary(table: Table, base: Table | None, labels: Sequence[str]) -> dict[str, float]:
    """The numbers that a run's records and curves show.

    They are the mean of each column by its name, `share/<label>`, and where there are features `diversity`,
    `prompt_diversity` and `drift`, the CMMD from the base. `win/<column>` is the share of samples that score higher
    than the base's from the same noise.

    Args:
        table: Numbers of every sample.
        base: Numbers of every sample of the base; None: nothing is compared.
        labels: Names of the labels, in the order of their numbers.
    """
    numbers = {name: float(column.mean()) for name, column in table.columns.items() if name != LABEL}
    if LABEL in table.columns:
        numbers |= {f"share/{name}": float((table.columns[LABEL] == i).float().mean()) for i, name in enumerate(labels)}
    has_features = table.features.shape[1] > 0
    if has_features:
        if len(table.features) > 1:
            numbers["diversity"] = diversity(table.features)
        if len(table.groups.unique()) < len(table.groups):
            numbers["prompt_diversity"] = prompt_diversity(table.features, table.groups)
    if base is not None and are_paired(table, base):
        if has_features:
            numbers["drift"] = cmmd(table.features, base.features)
        for name in won(table, base):
            numbers[f"win/{name}"] = float(wins(table.columns[name], base.columns[name]).mean())
    return numbers


def won(table: Table, base: Table) -> list[str]:
    """The columns by which a sample can be better than the base's."""
    return [name for name in table.columns if name not in NOT_WON and name in base.columns]


def warn_of_unknown(weights: str, table: Table, step: int) -> None:
    """Warn of samples with a score that is not a number: the mean over all samples is none either."""
    unknown = torch.stack([~column.isfinite() for column in table.columns.values()]).any(0)
    if unknown.any():
        rank_zero_warn(
            f"step {step}: {int(unknown.sum())} of {len(unknown)} samples of {weights} have scores that are not "
            f"numbers, sample {int(table.indices[unknown][0])} the first: look at the pictures; lower the learning "
            "rate, or draw in a wider precision (trainer.precision)"
        )


class Measure(NamedTuple):
    """A column of one table.

    Args:
        mean: Mean, with its interval over prompts.
        std: Standard deviation over samples.
        quantiles: Quantiles at metrics.QUANTILES.
        win: Win rate against the base, with its interval; None where there is none.
    """

    mean: Interval
    std: float
    quantiles: list[float]
    win: Interval | None


def measures(table: Table, base: Table | None) -> dict[str, Measure]:
    """The measures of all columns of a table but the label."""
    found = {}
    for name, column in table.columns.items():
        if name == LABEL:
            continue
        win = None
        if base is not None and are_paired(table, base) and name in won(table, base):
            win = bootstrap_mean(wins(column, base.columns[name]), table.groups)
        at = torch.tensor(QUANTILES, dtype=column.dtype)
        std = float(column.std()) if len(column) > 1 else 0.0
        found[name] = Measure(bootstrap_mean(column, table.groups), std, column.quantile(at).tolist(), win)
    return found


Compared: TypeAlias = dict[str, dict[str, dict[str, Measure]]]
"""By tag (`all` first), by weights, by column."""


def compare(tables: Mapping[str, Table], tags: Sequence[Sequence[str]] = ()) -> Compared:
    """Every measure of every kind of weights, over all prompts and over those of each tag."""
    base = tables.get(BASE)
    found = {"all": {weights: measures(table, base) for weights, table in tables.items()}}
    split = {weights: by_tag(table, tags) if tags else {} for weights, table in tables.items()}
    for tag in next(iter(split.values())):
        own_base = split[BASE][tag] if base is not None else None
        found[tag] = {weights: measures(split[weights][tag], own_base) for weights in tables}
    return found


def write_comparison(path: Path, compared: Compared, head: Mapping[str, Any]) -> str:
    """Write `<path>.json` with every number and `<path>.md` with a table per tag; return the text of the second."""
    content = {
        tag: {weights: {name: as_dict(m) for name, m in of.items()} for weights, of in by_weights.items()}
        for tag, by_weights in compared.items()
    }
    text = "\n".join(markdown(tag, by_weights) for tag, by_weights in compared.items())
    for suffix, body in ((".json", strict_json({**head, "compared": content}, 2)), (".md", text)):
        with complete_or_absent(path.with_suffix(suffix)) as partial:
            partial.write_text(body, encoding="utf-8")
    return text


def as_dict(measure: Measure) -> dict[str, Any]:
    """The measure as nested dictionaries, for JSON."""
    win = measure.win and measure.win._asdict()
    return {**measure._asdict(), "mean": measure.mean._asdict(), "win": win}


def markdown(tag: str, by_weights: Mapping[str, Mapping[str, Measure]]) -> str:
    """Means with the half width of their 95 % interval, and win rates against the base."""
    heads = [h for weights in by_weights for h in ([weights] if weights == BASE else [weights, f"{weights} wins"])]
    has_base = BASE in by_weights
    if not has_base:
        heads = list(by_weights)
    rows = []
    for name in next(iter(by_weights.values())):
        cells = [name]
        for weights, of in by_weights.items():
            mean, win = of[name].mean, of[name].win
            cells.append(f"{mean.value:.4g}" + (f" +- {mean.half:.2g}" if mean.is_known else ""))
            if has_base and weights != BASE:
                bounds = f" ({win.low:.0%} to {win.high:.0%})" if win and win.is_known else ""
                cells.append(f"{win.value:.0%}{bounds}" if win else "")
        rows.append(cells)
    return f"### {escaped(tag)}\n\n{markdown_table(['', *heads], rows)}\n"


def save_table(path: Path, table: Table, key: str) -> None:
    """Save a table, complete or absent, with a sum of every byte of the file.

    Args:
        path: Path of the file.
        table: Numbers of every sample.
        key: What the numbers depend on, as a hash; empty where nobody asks.
    """
    columns = {f"column/{name}": column.contiguous() for name, column in table.columns.items()}
    tensors = {"indices": table.indices, "groups": table.groups, "features": table.features, **columns}
    header = {"key": key, "columns": list(table.columns), "crc32": NO_SUM.decode()}
    blank = save(tensors, {HEADER: json.dumps(header)})  # of several entries the order would be another each time
    found = PLACE_OF_SUM.search(blank)
    assert found is not None
    with complete_or_absent(path) as partial:
        partial.write_bytes(blank[: found.start(1)] + b"%08x" % zlib.crc32(blank) + blank[found.end(1) :])


def read_table(path: Path, key: str | None = None) -> Table | None:
    """A table that was saved; None if there is none, or one of another key, or a damaged one where a key is given.

    Raises:
        ValueError: if it is damaged and no key is given, so that nobody will measure it again.
    """
    if not path.is_file():
        return None
    header = read_header(path)
    if header is None and key is None:
        raise ValueError(
            f"table {path} is damaged, or an earlier version's: delete it, and measure it again with `validate`"
        )
    if header is None:
        rank_zero_warn(f"table {path} is damaged, or an earlier version's: it is measured again")
    if header is None or (key is not None and header["key"] != key):
        return None
    tensors = load_file(path)
    columns = {name: tensors[f"column/{name}"] for name in header["columns"]}
    return Table(tensors["indices"], tensors["groups"], columns, tensors["features"])


def read_header(path: Path) -> dict[str, Any] | None:
    """What a table says of itself; None if a byte of the file is not what was written."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    found = PLACE_OF_SUM.search(content, 8, min(end, len(content)))
    if found is None:
        return None
    blank = content[: found.start(1)] + NO_SUM + content[found.end(1) :]
    if zlib.crc32(blank) != int(found[1], 16):
        return None
    header: dict[str, Any] = json.loads(json.loads(content[8:end])["__metadata__"][HEADER])
    return header
