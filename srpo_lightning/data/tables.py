"""Files of rows: a prompt per line, JSON lines, CSV and Parquet, read one row after the other."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

Row: TypeAlias = dict[str, Any]

BOM = "\ufeff"
CAPTION_BYTES = 1 << 20
"""The longest caption or record that is a file of its own."""

LINE_LETTERS = 1 << 24
"""The longest line or cell of a table: a damaged file may be one line without end."""


class Found(NamedTuple):
    """A row and where it stands."""

    row: Row
    source: str
    number: int | str
    unit: str = "line"

    @property
    def place(self) -> str:
        """For messages."""
        return f"prompt file {self.source}, {self.unit} {self.number}"


def table_rows(file: Path, kind: str, prompt: str) -> Iterator[Found]:
    """The rows of a file.

    Args:
        file: to read.
        kind: a key of `KINDS`.
        prompt: the key under which text that has no column of its own is put.

    Raises:
        ValueError: naming the line and the cure, if the file is damaged or is not what `kind` says.
    """
    try:
        yield from KINDS[kind](file, prompt)
    except UnicodeDecodeError as error:
        line = _first_line_that_is_no_text(file)
        raise ValueError(f"prompt file {file}, line {line} is not UTF-8 text: save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"prompt file {file} cannot be read ({error.strerror}): mend that, or copy it anew") from error


def caption_of(file: Path) -> str:
    """What stands in a file that is one caption.

    Raises:
        ValueError: naming the file and the cure, if it is no text or too long.
    """
    size = file.stat().st_size if file.is_file() else 0
    if size > CAPTION_BYTES:
        raise ValueError(f"caption {file} has {size} bytes, at most {CAPTION_BYTES} are read: shorten it")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {file} is not UTF-8 text ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"prompt file {file} cannot be read ({error.strerror}): mend that") from error


def object_of(text: str, place: str) -> Row:
    """A JSON object.

    Raises:
        ValueError: with the place, if the text is none.
    """
    try:
        record = DECODER.decode(text.strip(BOM))
    except RecursionError as error:
        raise ValueError(f"{place}: lists and objects nested too deeply: leave that column out") from error
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {type(record).__name__}, expected an object with keys")
    return record


def _each_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"{_twice(name for name, _ in pairs)!r} stands there twice: keep one")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _twice(names: Any) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _lines(file: Path, prompt: str) -> Iterator[Found]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(_of_some_length(stream, file), 1):
            found = Found({prompt: line}, str(file), number)
            if number == 1 and _is_object(line):
                raise ValueError(f"{found.place} is JSON, not a prompt: name the file {file.stem}.jsonl")
            yield found


def _of_some_length(stream: TextIO, file: Path) -> Iterator[str]:
    for number in count(1):
        line = stream.readline(LINE_LETTERS + 1)
        if len(line) > LINE_LETTERS:
            raise ValueError(f"prompt file {file}, line {number} has more than {LINE_LETTERS} letters: divide it")
        if not line:
            return
        yield line


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(object_of(line, ""), dict)
    except ValueError:
        return False


def _objects(file: Path, prompt: str) -> Iterator[Found]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(_of_some_length(stream, file), 1):
            found = Found({prompt: ""}, str(file), number)
            yield found._replace(row=object_of(line, found.place)) if line.strip() else found


def _table(file: Path, _: str) -> Iterator[Found]:
    csv.field_size_limit(LINE_LETTERS)  # prompts may be longer than the 128 KiB that csv starts with
    with file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.DictReader(_of_some_length(stream, file), strict=True)
            names = [name.strip() for name in reader.fieldnames or []]
            if name := _twice(name for name in names if name):
                raise ValueError(f"prompt file {file}, line 1: two columns are called {name!r}: rename one")
            for row in reader:
                found = Found(row, str(file), reader.line_num)
                if None in row:
                    raise ValueError(f"{found.place}: more cells than columns; quote cells that hold commas")
                yield found
        except csv.Error as error:
            raise ValueError(f"prompt file {file}: not a table ({error}); save it as CSV with a header") from error


def _parquet(file: Path, _: str) -> Iterator[Found]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield Found(row, str(file), number, "entry")
    except (ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"prompt file {file}: not a parquet file ({told}); write it anew") from error


KINDS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _table,
    ".parquet": _parquet,
}


def _first_line_that_is_no_text(file: Path) -> int:
    with file.open("rb") as stream:
        for number in count(1):
            line = stream.readline(LINE_LETTERS)
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
            if not line:
                break
    return 0
