"""The rows of files and folders, whatever their kind: one dictionary each, read one after the other."""

import csv
import hashlib
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from srpo_lightning.checkpoints import complete_or_absent

Row: TypeAlias = dict[str, Any]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KEPT = Path(".cache/pictures")
SLICE = "@"  # between an archive's path and where in it a picture lies


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


def rows(path: str, prompt: str, image: str, split: str) -> Iterator[Found]:
    """The rows of a source.

    Args:
        path: .txt (a prompt per line), .jsonl, .csv, .parquet, a webdataset .tar, a folder of such files, of pictures
            with captions beside them or as `datasets` saves it, or a Hugging Face dataset id.
        prompt: the key under which text that has no column of its own is put.
        image: the same for pictures.
        split: of a Hugging Face dataset.

    Raises:
        ValueError: naming the cure, if there is no such source, or it is damaged.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _folder(file, prompt, image, split)
    if not file.suffix or not file.exists():
        if _is_hub_id(path):
            return _hub(path, split)
        raise ValueError(f"prompt file {path} does not exist (looked for {file.resolve()})")
    if file.suffix not in KINDS and file.suffix != ".tar":
        raise ValueError(f"prompt file {path}: the name must end in one of {', '.join([*KINDS, '.tar'])}")
    return _decoded(file, prompt, image)


def read_picture(reference: str) -> bytes:
    """The bytes of a picture: a file's, or those of a part of an archive.

    Raises:
        ValueError: if it cannot be read.
    """
    path, _, place = reference.rpartition(SLICE)
    start, _, size = place.partition("+")
    in_archive = path.endswith(".tar") and start.isdecimal() and size.isdecimal()
    try:
        with Path(path if in_archive else reference).open("rb") as stream:
            stream.seek(int(start) if in_archive else 0)
            return stream.read(int(size) if in_archive else -1)
    except OSError as error:
        raise ValueError(f"picture {reference} cannot be read ({error.strerror}): correct its path") from error


def keep_picture(content: bytes) -> str:
    """Write a picture that came inside a table to a file named by its content; returns the path."""
    path = (KEPT / hashlib.sha256(content).hexdigest()).resolve()
    if not path.is_file():
        with complete_or_absent(path) as partial:
            partial.write_bytes(content)
    return str(path)


def _decoded(file: Path, prompt: str, image: str) -> Iterator[Found]:
    try:
        if file.suffix == ".tar":
            yield from _archive(file, prompt, image)
        else:
            yield from KINDS[file.suffix](file, prompt)
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {file} is not UTF-8 text ({error}): save it as UTF-8") from error


def _lines(file: Path, prompt: str) -> Iterator[Found]:
    source = str(file)
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            yield Found({prompt: line}, source, number)


def _objects(file: Path, prompt: str) -> Iterator[Found]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            found = Found({prompt: ""}, str(file), number)
            yield found._replace(row=_object(line, found.place)) if line.strip() else found


def _object(text: str, place: str) -> Row:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {type(record).__name__}, expected an object with keys")
    return record


def _table(file: Path, _: str) -> Iterator[Found]:
    csv.field_size_limit(sys.maxsize)  # prompts may be longer than the 128 KiB that csv starts with
    with file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.DictReader(stream, strict=True)
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
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield Found(row, str(file), number, "entry")
    except (ArrowException, OSError) as error:
        raise ValueError(f"prompt file {file}: not a parquet file ({error}); write it anew") from error


KINDS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _table,
    ".parquet": _parquet,
}


def _archive(file: Path, prompt: str, image: str) -> Iterator[Found]:
    """A webdataset: files of one sample share their name up to its first dot and follow one another."""
    try:
        with tarfile.open(file, "r:") as archive:
            name, row = "", Row()
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                sample = f"{folder}/{stem}" if folder else stem
                if sample != name and row:
                    yield Found(row, str(file), name, "sample")
                    row = Row()
                name = sample
                if f".{kind.lower()}" in PICTURES:
                    row[image] = f"{file}{SLICE}{member.offset_data}+{member.size}"
                elif kind in ("txt", "json"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    text = stream.read().decode("utf-8-sig")
                    row |= {prompt: text} if kind == "txt" else _object(text, f"prompt file {file}, {member.name}")
            if row:
                yield Found(row, str(file), name, "sample")
    except tarfile.TarError as error:
        raise ValueError(f"prompt file {file}: not an uncompressed tar archive ({error}); write it anew") from error


def _folder(folder: Path, prompt: str, image: str, split: str) -> Iterator[Found]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _saved(folder, split)
        return
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    tables = sorted(path for path in folder.iterdir() if path.suffix in (*KINDS, ".tar") and path.suffix != ".txt")
    if tables:
        for file in tables:
            yield from _decoded(file, prompt, image)
        return
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"{bare[0]} and {len(bare) - 1} other pictures have no caption: write one into {bare[0].stem}.txt beside it"
        )
    if not pictures:
        raise ValueError(
            f"folder {folder} holds neither pictures ({', '.join(PICTURES)}) with captions in .txt files beside them "
            "nor .jsonl, .csv, .parquet or .tar files: name the file or the folder that does"
        )
    for path in pictures:
        caption = path.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt file {caption} is not UTF-8 text ({error}): save it as UTF-8") from error
        yield Found({prompt: text, image: str(path.resolve())}, str(folder), path.name, "picture")


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not Path(path).suffix


def _saved(folder: Path, split: str) -> Iterator[Found]:
    loaded = _datasets().load_from_disk(str(folder))
    yield from _records(loaded[split] if isinstance(loaded, dict) else loaded, str(folder))


def _hub(name: str, split: str) -> Iterator[Found]:
    try:
        dataset = _datasets().load_dataset(name, split=split)
    except OSError as error:
        raise ValueError(
            f"prompt file {name}: neither a file here nor a Hugging Face dataset that could be fetched "
            f"({type(error).__name__}: {error}); correct the path, or log in with `hf auth login`"
        ) from error
    yield from _records(dataset, name)


def _records(dataset: Any, name: str) -> Iterator[Found]:
    for key, feature in dataset.features.items():
        if type(feature).__name__ == "Image":
            dataset = dataset.cast_column(key, type(feature)(decode=False))
    for number, row in enumerate(dataset, 1):
        yield Found(row, name, number, "entry")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "Hugging Face dataset ids and saved datasets are read by the package `datasets`: pip install datasets; "
            "or name .parquet, .jsonl or .csv files"
        ) from error
    return datasets
