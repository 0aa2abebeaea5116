"""Where rows come from: a file, an archive, a folder of them or of pictures, or a Hugging Face dataset."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srpo_lightning.data.archives import archive_rows
from srpo_lightning.data.picture_files import ARRAYS, OPENED, PICTURES, is_hidden
from srpo_lightning.data.tables import KINDS, Found, caption_of, table_rows

ARCHIVE = ".tar"
FIRST_WITHOUT_SCRIPTS = (2, 20)
"""From this version on the package `datasets` runs no script of a dataset unasked (its pull request 6954)."""

READ = (*KINDS, ARCHIVE)
UNREAD = (".tsv", ".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip", ".arrow", ".xls", ".xlsx")
"""Kinds of files that hold rows elsewhere: refused, so that nobody waits for what is in them."""


def rows(path: str, prompt: str, image: str, split: str) -> Iterator[Found]:
    """The rows of a source.

    Args:
        path: .txt (a prompt per line; so is a file without suffix), .jsonl, .csv, .parquet, a webdataset .tar, a folder
            of such files, of pictures with captions beside them or as `datasets` saves it, or a Hugging Face dataset
            id. Hidden files of a folder or an archive, and __MACOSX, are passed over.
        prompt: the key under which text that has no column of its own is put.
        image: the same for pictures.
        split: of a Hugging Face dataset.

    Raises:
        ValueError: naming the cure, if there is no such source, or it is damaged.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _folder(file, prompt, image, split)
    if not file.exists():
        if _is_hub_id(path):
            return _hub(path, split)
        raise ValueError(f"prompt file {path} does not exist (looked for {file.resolve()})")
    if not file.is_file():
        raise ValueError(f"prompt file {path} is a device or a pipe, which may have no end: write it to a file")
    if _kind(file) not in READ:
        raise ValueError(f"prompt file {path}: the name must end in one of {', '.join(READ)}")
    return _of_file(file, prompt, image)


def _kind(file: Path) -> str:
    return file.suffix.lower() or ".txt"


def _of_file(file: Path, prompt: str, image: str) -> Iterator[Found]:
    kind = _kind(file)
    return archive_rows(file, prompt, image) if kind == ARCHIVE else table_rows(file, kind, prompt)


def _folder(folder: Path, prompt: str, image: str, split: str) -> Iterator[Found]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(folder, split)
    files = _files_in(folder)
    for file in files:
        if file.suffix.lower() in UNREAD:
            raise ValueError(f"{file} in a folder of prompts is not read: write it as {', '.join(READ)}, or move it")
        if file.suffix.lower() in (*READ, *PICTURES, *ARRAYS) and not file.is_file():
            raise ValueError(f"{file} is a broken link, a device or a pipe: replace it by a file, or delete it")
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    tables = [file for file in files if file.suffix.lower() in READ and file not in set(texts)]
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    pictures = sorted([*pictures, *_arrays_of_clips(files, pictures)])
    if tables and texts:
        raise ValueError(
            f"folder {folder} holds both {tables[0].relative_to(folder)} and {texts[0].relative_to(folder)}: name the "
            "one that is meant, or give each kind a folder of its own"
        )
    if tables or (texts and not pictures):
        return (found for file in tables or texts for found in _of_file(file, prompt, image))
    if not pictures:
        raise ValueError(
            f"folder {folder} holds neither pictures ({', '.join(OPENED)}) with captions in .txt files beside them "
            f"nor {', '.join(KINDS)} or {ARCHIVE} files: name the file or the folder that does"
        )
    return _with_captions(folder, pictures, texts, prompt, image)


def _files_in(folder: Path) -> list[Path]:
    """All files in a folder and those below it, in the order of their names; each folder once, whatever links to it."""

    def fail(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be read ({error.strerror}): mend that") from error

    found, seen = [], set[str]()
    for own, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if os.path.realpath(own) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(own))
        found += [Path(own, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _arrays_of_clips(files: Sequence[Path], pictures: Sequence[Path]) -> list[Path]:
    """Arrays with captions; beside pictures others may be what programs keep of these, alone they lack a caption."""
    shown = {path.with_suffix("") for path in pictures}
    arrays = [own for own in files if own.suffix.lower() in ARRAYS and own.with_suffix("") not in shown]
    captioned = [own for own in arrays if own.with_suffix(".txt").is_file()]
    return arrays if captioned and not pictures else captioned


def _with_captions(
    folder: Path, pictures: Sequence[Path], captions: Sequence[Path], prompt: str, image: str
) -> Iterator[Found]:
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"{bare[0]} and {len(bare) - 1} other pictures have no caption: write one into {bare[0].stem}.txt beside it"
        )
    shown = {path.with_suffix("") for path in pictures}
    alone = [path for path in captions if path.with_suffix("") not in shown]
    if alone:
        raise ValueError(
            f"{alone[0]} and {len(alone) - 1} other captions have no picture beside them: add it, or move them away"
        )
    for path in pictures:
        row = {prompt: caption_of(path.with_suffix(".txt")), image: str(path.resolve())}
        yield Found(row, str(folder), str(path.relative_to(folder)), "picture")


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not Path(path).suffix


def _saved(folder: Path, split: str) -> Iterator[Found]:
    try:
        loaded = _datasets().load_from_disk(str(folder))
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"folder {folder} is a damaged dataset ({_told(error)}): save it anew") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(f"folder {folder} has no split {split!r} but {', '.join(loaded)}: name one of these")
        loaded = loaded[split]
    yield from _records(loaded, str(folder))


def _hub(name: str, split: str) -> Iterator[Found]:
    package = _datasets()
    try:
        dataset = package.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"prompt file {name}: neither a file here nor a Hugging Face dataset that could be fetched "
            f"({_told(error)}); correct the path or the split, or log in with `hf auth login`"
        ) from error
    yield from _records(dataset, name)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
    version = getattr(datasets, "__version__", "")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < FIRST_WITHOUT_SCRIPTS:
        raise ValueError(f"datasets {version} runs code that comes with a dataset: pip install --upgrade datasets")
    return datasets
