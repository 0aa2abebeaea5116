"""What raters have answered: a file for each, to which every answer is added before the next picture is shown."""

import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

from srpo_lightning.files import records
from srpo_lightning.files.records import Record

Slot: TypeAlias = tuple[int, str]
"""An item's number and the name of a question."""

LONGEST_NAME = 60

LONGEST_FILE = 255
"""Bytes of a file's name at most, on Linux and macOS."""


class Answer(NamedTuple):
    """One answer.

    Args:
        rater: Name of the rater.
        item: Number of the item.
        question: Name of the question.
        value: A grade, or a side.
        left: Number of the source whose picture was on the left; of a single picture its source.
    """

    rater: str
    item: int
    question: str
    value: str
    left: int


def rater_name(text: str) -> str:
    """The name that a rater is known by, whatever its capitals and blanks.

    Raises:
        ValueError: if it is empty or too long, or the name of its file would be.
    """
    name = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not name or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"a name has 1 to {LONGEST_NAME} letters: type yours")
    if len(file_name(name)) > LONGEST_FILE:
        raise ValueError(f"this name would be more than {LONGEST_FILE} bytes as that of a file: type a shorter one")
    return name


def file_name(rater: str) -> str:
    """The name of the file of a rater's answers, in ASCII."""
    return f"{quote(rater, safe='')}.jsonl"


class Answers:
    """The answers of all raters, in memory and on the disk; several threads may add some at once.

    Args:
        folder: Folder of the files, which need not exist yet.

    Raises:
        ValueError: naming file and line, if one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[str, dict[Slot, Answer]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for number, record in enumerate(records.read(path, "item", "an answer"), 1):
                self._take(*_checked(record, f"line {number} of {path}"))

    def file(self, rater: str) -> Path:
        """The file of a rater's answers."""
        return self._folder / file_name(rater)

    def of(self, rater: str) -> dict[Slot, Answer]:
        """A rater's answers as they stand, in the order in which they were given."""
        with self._lock:
            return dict(self._kept.get(rater, {}))

    def add(self, answer: Answer) -> bool:
        """Keep an answer, which is on the disk when this returns; False where the rater has given one to it already."""
        with self._lock:
            if (answer.item, answer.question) in self._kept.get(answer.rater, {}):
                return False
            self._write(answer, answer.value)
            self._take(answer, answer.value)
            return True

    def undo(self, rater: str) -> Slot | None:
        """Take back a rater's last answer, and tell to what it was; None where there is none."""
        with self._lock:
            own = self._kept.get(rater)
            if not own:
                return None
            last = next(reversed(own.values()))
            self._write(last, None)
            self._take(last, None)
            return last.item, last.question

    def __iter__(self) -> Iterator[Answer]:
        with self._lock:
            found = [answer for own in self._kept.values() for answer in own.values()]
        return iter(found)

    def _write(self, answer: Answer, value: str | None) -> None:
        record = answer._asdict() | {"value": value, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        records.append(self.file(answer.rater), record)

    def _take(self, answer: Answer, value: str | None) -> None:
        own = self._kept.setdefault(answer.rater, {})
        own.pop((answer.item, answer.question), None)
        if value is not None:
            own[answer.item, answer.question] = answer


def _checked(record: Record, place: str) -> tuple[Answer, str | None]:
    value = record.get("value")
    try:
        rater, item, question, left = (record[name] for name in ("rater", "item", "question", "left"))
        answer = Answer(rater, item, question, str(value), left)
        is_right = isinstance(answer.rater, str) and isinstance(answer.question, str) and isinstance(answer.left, int)
    except KeyError:
        is_right = False
    if not is_right or not isinstance(value, str | None):
        raise ValueError(f"{place} is no answer: delete that line, or put the file right")
    return answer, value
