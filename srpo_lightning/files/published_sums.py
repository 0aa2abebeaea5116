"""The SHA-256 that the Hugging Face hub publishes of a file: where a download keeps it, and whether the file has it."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

SMALL_BYTES = 16 << 20
"""Up to here a file is read whenever it is asked for; a larger one only if it has changed since it was."""

SAID_BYTES = 1 << 30
"""From here on it is said, since it takes a while."""


def check_sum(path: Path) -> None:
    """Refuse a file that has changed since it was published, where its folder tells the sum; else it is trusted.

    A large file is read once: its sum is remembered with its size and time of change in
    `~/.cache/srpo_lightning/sums/` (or `$XDG_CACHE_HOME`). On several ranks the first one of each node does it.

    Raises:
        ValueError: naming the file and the cure.
    """
    expected = published_sum(path)
    if expected is None or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        return
    now = path.stat()
    state = f"{expected} {now.st_size} {now.st_mtime_ns}"
    record = _record(path)
    if now.st_size > SMALL_BYTES and record.is_file() and record.read_text() == state:
        return
    if now.st_size > SAID_BYTES:
        rank_zero_info(f"{path}: its {now.st_size / 1e9:.0f} GB are compared with the published SHA-256, once")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not what was published: its SHA-256 is {found[:12]}..., the published one {expected[:12]}...; "
            f"delete {path.resolve()} and download it again (if you changed it yourself, copy the model to a folder "
            "without .cache/)"
        )
    if now.st_size > SMALL_BYTES:
        with suppress(OSError):  # a home that cannot be written: the next start reads the file again
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(state)


def published_sum(path: Path) -> str | None:
    """What the hub's cache calls the file's content by, or what `hf download --local-dir` noted; None if neither."""
    content = path.resolve()
    if content.parent.name == "blobs" and _is_sha256(content.name):
        return content.name
    for folder in path.absolute().parents:
        noted = folder / ".cache" / "huggingface" / "download" / f"{path.absolute().relative_to(folder)}.metadata"
        if noted.is_file():
            _, etag, *_ = [*noted.read_text().splitlines(), "", ""]
            return etag if _is_sha256(etag) else None
    return None


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _record(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "srpo_lightning" / "sums" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
