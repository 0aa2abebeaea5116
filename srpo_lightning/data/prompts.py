"""Prompts from files, folders and archives: what each record says, and how sets are cleaned and split."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

from srpo_lightning.batch import Size
from srpo_lightning.data.files import Found, keep_picture, rows

PX_PER_TOKEN = 16  # FLUX's VAE halves three times, packing once more


class Prompt(NamedTuple):
    """One record.

    Args:
        text: what the picture should show, stripped.
        image: where a real picture of it is: a path, or a place in a .tar.
        seed: of its evaluation sample.
        negative_prompt: what the picture should move away from.
        tags: to report by.
        size: of its picture.
    """

    text: str
    image: str | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    tags: list[str] | None = None
    size: Size | None = None


@dataclass
class Source:
    """Where prompts come from, and what their columns are called; columns that are not there are left out.

    Args:
        path: .txt (a prompt per line), .jsonl, .csv, .parquet, a webdataset .tar, a folder of these, of pictures with
            captions in .txt files beside them or as `datasets` saves it, or a Hugging Face dataset id.
        weight: its share of the drawn prompts, next to those of other sources.
        prompt: the column of the text.
        image: of a picture's path, relative to the file, or of the picture itself, which is then kept as a file.
        seed: of the number that the evaluation sample is drawn from.
        negative_prompt: of what to move away from.
        tags: of a list, or a text with commas.
        width: of the picture's width in pixels.
        height: of its height.
        split: of a Hugging Face dataset.
    """

    path: str
    weight: float = 1.0
    prompt: str = "prompt"
    image: str = "image"
    seed: str = "seed"
    negative_prompt: str = "negative_prompt"
    tags: str = "tags"
    width: str = "width"
    height: str = "height"
    split: str = "train"

    def __post_init__(self) -> None:
        """Refuse what a configuration file may say wrongly."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "weight" and not isinstance(value, str):
                raise ValueError(f"prompt source {self.path}: {field.name} is {value!r}, expected a text")
        if not isinstance(self.weight, int | float) or not self.weight > 0:
            raise ValueError(f"prompt source {self.path}: weight is {self.weight!r}, expected a number above 0")


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
    columns = _Columns(source)
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
    result = PromptSet(PromptSet.of(sets).table, num_empty)
    if not result:
        raise ValueError(
            f"prompt file {source.path} holds no prompt ({num_empty} empty lines): write one prompt per line"
        )
    return result


def _pair(size: Sequence[int] | None) -> Size | None:
    return (size[0], size[1]) if size else None


DEFAULTS = {field.name: field.default for field in fields(Source)}


class _Columns:
    """Makes records of rows.

    Args:
        source: names the columns.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        parsers: dict[str, Callable[[Any], Any]] = {
            "image": partial(_picture, folder=_folder_of(source.path)),
            "seed": _integer,
            "negative_prompt": _text,
            "tags": _tags,
            "width": _integer,
            "height": _integer,
        }
        self.optional = [(name, getattr(source, name), parse) for name, parse in parsers.items()]
        self.needed = {name: getattr(source, name) for name in ("prompt", *parsers)}
        self.needed = {name: own for name, own in self.needed.items() if name == "prompt" or own != DEFAULTS[name]}

    def record(self, found: Found) -> Prompt:
        """The record of a row."""
        row = found.row
        for name, column in self.needed.items():
            if column not in row:
                raise ValueError(
                    f"{found.place}: no column {column!r} among {sorted(map(str, row))}; name the right one, "
                    f"{{path: {self.source.path}, {name}: ...}}"
                )
        prompt = self.source.prompt
        text = _checked(prompt, found, row[prompt], _text) or ""
        if len(row) == 1:
            return Prompt(text)
        values = {
            name: _checked(column, found, row[column], parse) for name, column, parse in self.optional if column in row
        }
        width, height = values.pop("width", None), values.pop("height", None)
        if (width is None) != (height is None):
            raise ValueError(f"{found.place}: width is {width} and height is {height}, expected both or neither")
        if width is not None and height is not None:
            check_size(width, height, found.place)
            values["size"] = (height, width)
        return Prompt(text, **values)


def _checked(column: str, found: Found, value: Any, parse: Callable[[Any], Any]) -> Any:
    if value is None or value == "":
        return None
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{found.place}: {column!r} {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {type(value).__name__}, expected a text")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character, which no text can be saved with ({error}): mend it") from error
    return value.strip()


def _folder_of(path: str) -> Path:
    file = Path(path).expanduser()
    return (file if file.is_dir() else file.parent).resolve()


def _picture(value: Any, folder: Path) -> str:
    content = value
    if isinstance(value, Mapping):  # as `datasets` has it
        content = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(content, str):
        return str(folder / Path(content).expanduser())
    if isinstance(content, bytes):
        return keep_picture(content)
    raise ValueError(f"is {type(value).__name__}, expected a path, or the bytes of a picture file")


def _integer(value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ValueError(f"is {value!r}, expected a whole number") from error
    return int(value)


def _tags(value: Any) -> list[str]:
    if isinstance(value, str):
        return [tag.strip() for tag in value.split(",") if tag.strip()]
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return value
    raise ValueError(f"is {value!r}, expected a list of texts, or one text with commas")


def check_size(width: int, height: int, where: str) -> None:
    """Refuse a picture that does not consist of whole tokens.

    Raises:
        ValueError: with the nearest sizes that do.
    """
    for side in (width, height):
        below = side - side % PX_PER_TOKEN
        if side <= 0 or side % PX_PER_TOKEN:
            raise ValueError(
                f"{where}: {width} x {height} pixels, of which {PX_PER_TOKEN} does not divide {side}: make it "
                f"{max(below, PX_PER_TOKEN)} or {max(below, 0) + PX_PER_TOKEN}"
            )


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
