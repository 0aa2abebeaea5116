"""Prompts from files, folders and archives: what each record says, and how sets are cleaned and split."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.batch import Size
from srpo_lightning.data.columns import Columns, Prompt, Source
from srpo_lightning.data.files import rows

# Not Source itself: jsonargparse would take a path for a configuration file with its arguments, and read it.
Sources: TypeAlias = str | dict[str, Any] | list[str | dict[str, Any]]
"""Prompts from one place or from several: paths, or the arguments of `Source`."""

SCHEMA = pa.schema(
    {
        "text": pa.large_string(),
        "image": pa.large_string(),
        "seed": pa.int64(),
        "negative_prompt": pa.large_string(),
        "tags": pa.list_(pa.string()),
        "size": pa.list_(pa.int32()),
    }
)
ROWS_AT_ONCE = 16_384


class PromptSet(Sequence[Prompt]):
    """Records in the order of their source, held in columns: a million of them are no million Python objects.

    Args:
        table: of `SCHEMA`.
        num_empty: records without a text, which were left out.
        num_duplicates: records that were there already, which were left out.
    """

    def __init__(self, table: pa.Table, num_empty: int = 0, num_duplicates: int = 0) -> None:
        self.table = table.combine_chunks()
        self.num_empty, self.num_duplicates = num_empty, num_duplicates

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        """One record, or by a slice a set of them."""
        if isinstance(index, slice):
            return PromptSet(self.table[index], self.num_empty, self.num_duplicates)
        if index >= len(self):
            raise IndexError(index)
        record = Prompt(*(column[index].as_py() for column in self.table.columns))
        return record._replace(size=_pair(record.size))

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return list(self.table.column("text").to_pylist())

    @property
    def sizes(self) -> list[Size | None]:
        """The size of each record's picture."""
        return [_pair(size) for size in self.table.column("size").to_pylist()]

    @classmethod
    def from_records(cls, records: Sequence[Prompt]) -> "PromptSet":
        """A set of given records."""
        columns = zip(*records, strict=True) if records else [()] * len(SCHEMA)
        arrays = [
            pa.nulls(len(records), field.type)
            if all(value is None for value in column)
            else pa.array(column, field.type)
            for column, field in zip(columns, SCHEMA, strict=True)
        ]
        return cls(pa.table(arrays, schema=SCHEMA))

    @classmethod
    def of(cls, sets: Sequence["PromptSet"]) -> "PromptSet":
        """The records of several sets, one set after the other."""
        table = pa.concat_tables([own.table for own in sets])
        return cls(table, sum(own.num_empty for own in sets), sum(own.num_duplicates for own in sets))

    def with_pictures(self) -> "PromptSet":
        """The records that name a picture."""
        return PromptSet(self.table.filter(self.table.column("image").is_valid()))

    def unique(self) -> "PromptSet":
        """Each record once, where it comes first; records that differ in anything but tags are kept."""
        seen: set[Any] = set()
        keep = []
        columns = [self.table.column(name) for name in SCHEMA.names if name != "tags"]
        told = [column for column in columns if column.null_count < len(self)]
        for start in range(0, len(self), ROWS_AT_ONCE):
            parts = [column.slice(start, ROWS_AT_ONCE).to_pylist() for column in told]
            for index, values in enumerate(zip(*parts, strict=True), start):
                key = values[0] if len(values) == 1 else repr(values)
                if key not in seen:
                    seen.add(key)
                    keep.append(index)
        dropped = len(self) - len(keep)
        table = self.table.take(pa.array(keep, pa.int64())) if dropped else self.table
        return PromptSet(table, self.num_empty, self.num_duplicates + dropped)

    def split(self, fraction: float) -> tuple["PromptSet", "PromptSet"]:
        """Training and validation records; each goes by its text alone, so that adding others moves none."""
        held_out = pa.array([is_held_out(text, fraction) for text in self.prompts], pa.bool_())
        train = self.table.filter(pa.array([not value for value in held_out.to_pylist()], pa.bool_()))
        return PromptSet(train, self.num_empty, self.num_duplicates), PromptSet(self.table.filter(held_out))


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a prompt belongs to the validation set, as its hash says; a larger fraction only adds to the set."""
    digest = hashlib.blake2b(b"split/" + text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def read_prompts(source: str | Source) -> PromptSet:
    """The records of a source, as they stand there, without those that have no text.

    Raises:
        ValueError: naming the place and the cure, if the source is missing, damaged, empty, or lacks the column.
    """
    source = Source(source) if isinstance(source, str) else source
    num_empty = 0
    sets, pending = [], list[Prompt]()
    columns = Columns(source)
    for found in rows(source.path, source.prompt, source.image, source.split):
        record = columns.record(found)
        if not record.text:
            num_empty += 1
            continue
        pending.append(record)
        if len(pending) == ROWS_AT_ONCE:
            sets.append(PromptSet.from_records(pending))
            pending = []
    sets.append(PromptSet.from_records(pending))
    if columns.left_alone:
        rank_zero_info(f"prompt file {source.path}: columns that are not read: {', '.join(columns.left_alone)}")
    result = PromptSet(PromptSet.of(sets).table, num_empty)
    if not result:
        raise ValueError(
            f"prompt file {source.path} holds no prompt ({num_empty} empty lines): write one prompt per line"
        )
    return result


def _pair(size: Sequence[int] | None) -> Size | None:
    return (size[0], size[1]) if size else None


def listed(sources: Sources) -> list[Source]:
    """One source or several, always as a list.

    Raises:
        ValueError: if there are none, or one has an argument that `Source` does not know.
    """
    several = sources if isinstance(sources, list) else [sources]
    if not several:
        raise ValueError("prompt sources: an empty list, expected at least one path")
    try:
        return [Source(source) if isinstance(source, str) else Source(**source) for source in several]
    except TypeError as error:
        known = ", ".join(field.name for field in fields(Source))
        raise ValueError(f"prompt source {sources}: {error}; it may have {known}, and needs the path") from error
