"""What a folder of Parquet files says of itself, and whether that is whole and of our own writing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.data.tensor_files import FOREIGN, KEY, NAME, NAMES, StoredFile, TensorFile, in_a_line
from srpo_lightning.files.checkpoints import complete_or_absent, sync

Description: TypeAlias = dict[str, str | int]

MANIFEST = "parquet-manifest.json"
EARLIER = ("manifest.json", "index.json", "chunk-*")  # of stores that litdata read
CURE = "write it again with `python -m srpo_lightning cache --config CONFIG`"


class Manifest(NamedTuple):
    """What a whole folder says of itself.

    Args:
        description: What the tensors were computed with.
        files: Files of the store, in the order of its rows.
    """

    description: Description
    files: list[StoredFile]

    @property
    def num_items(self) -> int:
        """Items in all files."""
        return sum(len(file.keys) for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a whole folder.

    Raises:
        ValueError: with the cure, if it is damaged, or names what this program does not write.
    """
    try:
        content = json.loads(path.read_bytes())
        body = content["manifest"]
        if _sum(body) != content["sha256"]:
            raise ValueError("its checksum differs")
        files = [StoredFile(**file) for file in body["files"]]
        for file in files:
            if not NAME.fullmatch(file.name):
                raise ValueError(f"the file name {file.name!r:.80} is none that is written here")
            if type(file.num_bytes) is not int or not all(map(KEY.fullmatch, file.keys)):
                raise ValueError(f"the keys {file.keys[:1]!r:.80} are none that are written here")
        return Manifest(dict(body["description"]), files)
    except (OSError, *FOREIGN) as error:
        raise ValueError(f"{path} is damaged or foreign ({in_a_line(error)}): delete its folder and {CURE}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder whole: from now on it is read. Files that are not named go, and those of earlier versions."""
    body = {
        "description": manifest.description,
        "count": manifest.num_items,
        "bytes": manifest.num_bytes,
        "files": [file._asdict() for file in manifest.files],
    }
    with complete_or_absent(folder / MANIFEST) as partial:
        partial.write_text(json.dumps({"manifest": body, "sha256": _sum(body)}), encoding="utf-8")
    sync(folder)
    named = {file.name for file in manifest.files}
    for pattern in (NAMES, *EARLIER):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink()


def finished_files(folder: Path) -> list[StoredFile]:
    """Files that are whole, as far as sizes and footers tell: those of the manifest, and those written since."""
    known = read_manifest(folder / MANIFEST).files if (folder / MANIFEST).is_file() else []
    files = []
    for file in known:
        if problem := damage(folder / file.name, file):
            rank_zero_info(f"{folder / file.name} {problem}: its {len(file.keys)} items are made again")
        else:
            files.append(file)
    for path in sorted({*folder.glob(NAMES)} - {folder / file.name for file in known}):
        try:
            files.append(StoredFile(path.name, path.stat().st_size, [entry.key for entry in TensorFile(path).entries]))
        except (OSError, ValueError) as error:
            rank_zero_info(f"{path} {in_a_line(error)}: its items are made again")
    keys: set[str] = set()
    kept = []
    for file in files:
        if not keys.issuperset(file.keys):
            keys.update(file.keys)
            kept.append(file)
    return kept


def damage(path: Path, file: StoredFile) -> str | None:
    """What is wrong with a file, as far as its size tells."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == file.num_bytes else f"has {size} bytes, expected {file.num_bytes}"


def is_earlier(folder: Path) -> bool:
    """Whether a folder holds a store that litdata read, and no other."""
    return not (folder / MANIFEST).is_file() and any(any(folder.glob(pattern)) for pattern in EARLIER)


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
