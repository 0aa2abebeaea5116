"""Files of one JSON object per line, each with the `step` that it was written after, or another whole number."""

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.full_disk import room_for
from srpo_lightning.files.strict_json import strict_json

Record: TypeAlias = dict[str, Any]


def append(path: Path, *added: Record) -> None:
    """Add lines, which are on the disk when this returns; a last line that a kill has left unfinished goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path), path.open("ab") as stream:
        stream.truncate(len(_whole_lines(path)))
        stream.write("".join(strict_json(record) + "\n" for record in added).encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path, key: str = "step", of: str = "a step") -> list[Record]:
    """All lines, oldest first; none where there is no file. A last line that a kill has left unfinished is passed over.

    Line feeds alone end a line: a prompt may hold U+2028 and its like.

    Args:
        path: Path of the file.
        key: Name of the whole number that every line has.
        of: What a line is a record of, in the words of a message.

    Raises:
        ValueError: naming file and line, if one cannot be read.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            is_record = isinstance(record, dict) and isinstance(record[key], int)
        except (ValueError, KeyError):
            is_record = False
        if not is_record:
            raise ValueError(f"line {number} of {path} is no record of {of}: delete that line, or put the file right")
        found.append(record)
    return found


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def drop_after(path: Path, step: int) -> None:
    """Forget the records of later steps, and an unfinished last line. The file is whole at every moment."""
    kept = [record for record in read(path) if record["step"] <= step]
    if not kept:
        path.unlink()
        return
    with complete_or_absent(path) as partial:
        append(partial, *kept)
