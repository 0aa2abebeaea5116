"""Prompt files: one prompt per line (.txt), per object (.jsonl) or per row (.parquet)."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class PromptSet(NamedTuple):
    """The prompts of a file, stripped, in its order, and how many empty ones were skipped."""

    prompts: list[str]
    num_empty: int


def read_prompts(path: str, field: str = "prompt") -> PromptSet:
    """Read a prompt file.

    Args:
        path: .txt, .jsonl or .parquet.
        field: the key or column of the prompt in .jsonl and .parquet.

    Raises:
        ValueError: naming the cure, if the file is missing, of another kind, without that field, or empty.
    """
    file = Path(path).expanduser()
    readers: dict[str, Callable[[Path], Iterator[Any]]] = {
        ".txt": _lines,
        ".jsonl": partial(_objects, field=field),
        ".parquet": partial(_rows, field=field),
    }
    if file.suffix not in readers:
        raise ValueError(f"prompt file {path}: the name must end in one of {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"prompt file {path} does not exist (looked for {file.resolve()})")
    try:
        values = list(readers[file.suffix](file))
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text ({error}): save it as UTF-8") from error
    texts = [_text(value, path, number, field) for number, value in enumerate(values, 1)]
    prompts = [text for text in texts if text]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt ({len(texts)} empty lines): write one prompt per line")
    return PromptSet(prompts, len(texts) - len(prompts))


def _lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as stream:
        yield from stream


def _objects(file: Path, field: str) -> Iterator[Any]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                yield ""
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"prompt file {file}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict) or field not in record:
                raise ValueError(f"prompt file {file}, line {number}: no key {field!r}; name the right one as `field`")
            yield record[field]


def _rows(file: Path, field: str) -> Iterator[Any]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"prompt file {file}: not a parquet file ({error}); write it anew") from error
    if field not in table.schema_arrow.names:
        raise ValueError(
            f"prompt file {file}: no column {field!r} among {table.schema_arrow.names}; name it as `field`"
        )
    for batch in table.iter_batches(columns=[field]):
        yield from batch.column(0).to_pylist()


def _text(value: Any, path: str, number: int, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"prompt file {path}, entry {number}: {field!r} is {type(value).__name__}, expected a text")
    return value.strip()
