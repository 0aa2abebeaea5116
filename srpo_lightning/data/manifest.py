"""What a folder of chunks says of itself, and whether that is whole and of our own writing.

`manifest.json` has a sum of its own and one of every chunk's bytes. `index.json`, with which litdata reads the folder,
is a function of it, and is compared with it: litdata itself would take any name for a file, and unpickle what an index
calls so.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.files.checkpoints import complete_or_absent, sync
from srpo_lightning.files.crc import crc32

Description: TypeAlias = dict[str, str | int]

MANIFEST, INDEX = "manifest.json", "index.json"
COMPRESSION = "zstd:1"  # on byte planes higher levels gain nothing and take ten times as long
CURE = "write it again with `python -m srpo_lightning cache --config CONFIG`"

FILENAME = re.compile(r"chunk-[0-9a-f]{16}\.bin")
DTYPES = frozenset(("float32", "bfloat16", "float16", "float64"))
LITDATA = ("chunk_bytes", "chunk_size", "dim", "filename")
CONFIG: dict[str, Any] = {
    "chunk_bytes": None,
    "chunk_size": None,
    "compression": COMPRESSION,
    "compression_batch_size": None,
    "compression_level": "sample",
    "encryption": None,
    "ipc_compression": None,
}
"""What an index says of all chunks, beside what depends on the tensors; anything else is none of ours."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file of JSON raises, whose content may be anything."""


class Chunk(NamedTuple):
    """A file of items.

    Args:
        filename: within the folder.
        num_bytes: its size.
        sha256: of its bytes.
        keys: of its items, in order.
        dtypes: of each item's tensors, by name.
        litdata: what litdata's index says of it.
        config: what litdata's index says of all.
        crc32: of its bytes, which is quicker to compare; None: an earlier version wrote it.
    """

    filename: str
    num_bytes: int
    sha256: str
    keys: list[str]
    dtypes: dict[str, str]
    litdata: dict[str, Any]
    config: dict[str, Any]
    crc32: int | None = None


class Manifest(NamedTuple):
    """What a whole folder says of itself.

    Args:
        description: what the tensors were computed with.
        chunks: in the order of litdata's index.
        checksum: of this, as its file says it; empty: there is no file yet.
    """

    description: Description
    chunks: list[Chunk]
    checksum: str = ""

    @property
    def num_items(self) -> int:
        """Items in all chunks."""
        return sum(len(chunk.keys) for chunk in self.chunks)

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(chunk.num_bytes for chunk in self.chunks)

    @property
    def body(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "description": self.description,
            "count": self.num_items,
            "bytes": self.num_bytes,
            "chunks": [_written(chunk) for chunk in self.chunks],
        }

    @property
    def litdata_index(self) -> dict[str, Any]:
        """For litdata."""
        config = self.chunks[0].config if self.chunks else {}
        return {"chunks": [chunk.litdata for chunk in self.chunks], "config": config, "updated_at": self.checksum}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a whole folder.

    Raises:
        ValueError: with the cure, if it is damaged, or names what this program does not write.
    """
    try:
        body, checksum = _with_sum(path, "manifest")
        manifest = Manifest(dict(body["description"]), [Chunk(**chunk) for chunk in body["chunks"]], checksum)
        for chunk in manifest.chunks:
            _refuse_foreign(chunk)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or foreign ({_told(error)}): delete its folder and {CURE}") from error
    return manifest


def check_index(path: Path, manifest: Manifest) -> None:
    """Refuse an index for litdata that is not the manifest's.

    Raises:
        ValueError: naming the file and the cure.
    """
    if not manifest.chunks and not path.is_file():
        return
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        _write(path, manifest.litdata_index)
        return
    except (OSError, ValueError, RecursionError):
        found = None
    if found != manifest.litdata_index:
        raise ValueError(
            f"{path} is foreign or damaged (it is not what {MANIFEST} beside it says): delete it, it is written again"
        )


def finished_chunks(folder: Path) -> list[Chunk]:
    """Chunks that are whole: those of the manifest, and those written since, each key once."""
    chunks = read_manifest(folder / MANIFEST).chunks if (folder / MANIFEST).is_file() else []
    known = {chunk.filename for chunk in chunks}
    for path in sorted(folder.glob("chunk-*.json")):
        chunk = _finished(path)
        if chunk and chunk.filename not in known:
            chunks.append(chunk)
    keys: set[str] = set()
    kept = []
    for chunk in chunks:
        if not keys.issuperset(chunk.keys):
            keys.update(chunk.keys)
            kept.append(chunk)
    return kept


def _finished(record: Path) -> Chunk | None:
    try:
        chunk = Chunk(**_with_sum(record, "chunk")[0])
        _refuse_foreign(chunk)
    except DAMAGE as error:
        rank_zero_info(f"{record} is damaged ({_told(error)}): its items are made again")
        return None
    return chunk


def write_record(folder: Path, chunk: Chunk) -> None:
    """That a chunk is finished, until the folder is published."""
    content = _written(chunk)
    _write((folder / chunk.filename).with_suffix(".json"), {"chunk": content, "sha256": _sum(content)})


def publish(folder: Path, description: Description, chunks: Iterable[Chunk]) -> Manifest:
    """Make a folder whole: from now on it is read. Chunk files that are not named go."""
    manifest = Manifest(description, list(chunks))
    manifest = manifest._replace(checksum=_sum(manifest.body))
    _write(folder / INDEX, manifest.litdata_index)
    _write(folder / MANIFEST, {"manifest": manifest.body, "sha256": manifest.checksum})
    named = {chunk.filename for chunk in manifest.chunks}
    for file in folder.glob("chunk-*"):
        if file.name not in named:
            file.unlink()
    return manifest


def damage(path: Path, chunk: Chunk) -> str | None:
    """What is wrong with a chunk's file, as far as its size tells."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == chunk.num_bytes else f"has {size} bytes, expected {chunk.num_bytes}"


def damage_of_content(path: Path, chunk: Chunk) -> str | None:
    """What is wrong with a chunk's file, all of which is read."""
    if problem := damage(path, chunk):
        return problem
    with path.open("rb") as stream:
        same = sha256(path) == chunk.sha256 if chunk.crc32 is None else crc32(stream, chunk.num_bytes) == chunk.crc32
    return None if same else "has other bytes than were written (its checksum differs)"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _refuse_foreign(chunk: Chunk) -> None:
    """Raise ValueError for what this program does not write; litdata would obey it."""
    names, entry, config = list(chunk.dtypes), chunk.litdata, chunk.config
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    structure = [1, {"type": "builtins.dict", "context": json.dumps(names), "children_spec": [leaf] * len(names)}]
    told: dict[str, tuple[Any, bool]] = {
        "file name": (chunk.filename, FILENAME.fullmatch(chunk.filename) is not None),
        "keys": (chunk.keys[:1], "".join(chunk.keys).isascii()),
        "dtypes": (chunk.dtypes, DTYPES.issuperset(chunk.dtypes.values())),
        "entries": (sorted(entry), set(LITDATA).issuperset(entry) and entry.get("dim") is None),
        "name for litdata": (entry["filename"], entry["filename"] == chunk.filename),
        "number of items": (entry["chunk_size"], entry["chunk_size"] == len(chunk.keys)),
        "data format": (config["data_format"], config["data_format"] == ["numpy"] * len(names)),
        "structure": (config["data_spec"], json.loads(config["data_spec"]) == structure),
        "settings": (sorted(config), {*CONFIG, "data_format", "data_spec", "types"}.issuperset(config)),
    }
    told |= {name: (config.get(name), config.get(name) == value) for name, value in CONFIG.items()}
    for name, (found, is_ours) in told.items():
        if not is_ours:
            raise ValueError(f"the {name} {found!r:.80} of a chunk is none that is written here")


def _told(error: Exception) -> str:
    return str(error) if type(error) is ValueError else type(error).__name__


def _written(chunk: Chunk) -> dict[str, Any]:
    return {name: value for name, value in chunk._asdict().items() if (name, value) != ("crc32", None)}


def _with_sum(path: Path, name: str) -> tuple[dict[str, Any], str]:
    """What a file holds under a name, and the sum of it that it says, which is right."""
    content = json.loads(path.read_bytes())
    if _sum(content[name]) != content["sha256"]:
        raise ValueError("its checksum differs")
    return content[name], content["sha256"]


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
        sync(partial)
    sync(path.parent)
