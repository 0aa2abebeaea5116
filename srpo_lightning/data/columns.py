"""What the columns of a row say: the text, where its picture is, and what else is told of it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from srpo_lightning.batch import Size
from srpo_lightning.data.picture_files import keep_picture
from srpo_lightning.data.tables import BOM, Found

CELL = 16  # pixels that the sides of records' pictures are a multiple of, whatever the policy asks beyond
MOST_PX = 1 << 15
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # what is no blank either


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
        if not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"prompt source {self.path}: weight is {self.weight!r}, expected a number above 0")


DEFAULTS = {field.name: field.default for field in fields(Source)}


class Columns:
    """Makes records of rows.

    A column goes by its name; where there is none of that name, by one that differs in capitals and blanks alone.

    Args:
        source: names the columns.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.parsers: dict[str, Callable[[Any], Any]] = {
            "seed": _integer,
            "negative_prompt": _text,
            "tags": _tags,
            "width": _integer,
            "height": _integer,
        }
        self.names = {name: getattr(source, name) for name in ("prompt", "image", *self.parsers)}
        self.needed = {name for name, own in self.names.items() if name == "prompt" or own != DEFAULTS[name]}
        self.left_alone: dict[str, None] = {}
        self.find = lru_cache(maxsize=256)(self._find)

    def record(self, found: Found) -> Prompt:
        """The record of a row."""
        row = found.row
        try:
            columns = self.find(tuple(row))
        except ValueError as error:
            raise ValueError(f"{found.place}: {error}") from error
        prompt = columns["prompt"]
        text = _checked(prompt, found, row[prompt], _text) or ""
        if len(columns) == 1:
            return Prompt(text)
        values = {
            name: _checked(columns[name], found, row[columns[name]], parse)
            for name, parse in self.parsers.items()
            if name in columns
        }
        if (image := columns.get("image")) is not None:
            values["image"] = _checked(image, found, row[image], partial(_picture, folder=_folder_of(found.source)))
        width, height = values.pop("width", None), values.pop("height", None)
        if (width is None) != (height is None):
            raise ValueError(f"{found.place}: width is {width} and height is {height}, expected both or neither")
        if width is not None and height is not None:
            check_size(width, height, found.place)
            values["size"] = (height, width)
        return Prompt(text, **values)

    def _find(self, keys: tuple[Any, ...]) -> dict[str, Any]:
        """The key of each argument that a row of these keys has."""
        found = {}
        for name, column in self.names.items():
            same = [key for key in keys if key == column] or [key for key in keys if _plain(key) == _plain(column)]
            if len(same) > 1:
                raise ValueError(f"columns {same[0]!r} and {same[1]!r} may both be {column!r}: rename one")
            if same:
                found[name] = same[0]
            elif name in self.needed:
                raise ValueError(
                    f"no column {column!r} among {sorted(map(str, keys))}; name the right one, "
                    f"{{path: {self.source.path}, {name}: ...}}"
                )
        self.left_alone |= {str(key): None for key in keys if key not in found.values()}
        return found


def _plain(column: Any) -> str:
    return re.sub(r"[\s_-]+", "_", str(column).strip().strip(BOM).strip()).casefold()


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
    text = value.strip()
    if text.isprintable():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character, which no text can be saved with ({error}): mend it") from error
    if control := CONTROL.search(text):
        raise ValueError(
            f"holds the control character {control[0]!r}: remove it, or save the file as UTF-8, if it is in UTF-16"
        )
    return text.strip(BOM).strip()  # files that begin with it, one appended to the other


@lru_cache(maxsize=256)
def _folder_of(source: str) -> Path:
    file = Path(source).expanduser()
    return (file if file.is_dir() else file.parent).resolve()


def _picture(value: Any, folder: Path) -> str | None:
    content = value
    if isinstance(value, Mapping):  # as `datasets` has it
        content = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(content, str):
        return str(folder / Path(_text(content)).expanduser())
    if isinstance(content, bytes):
        return keep_picture(content)
    raise ValueError(f"is {type(content).__name__}, expected a path, or the bytes of a picture file")


def _integer(value: Any) -> int:
    number = value if type(value) is int else _whole(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"is {value!r:.40}, expected a whole number from -2**63 to 2**63 - 1")
    return number


def _whole(value: Any) -> int | None:
    """The number in a text or a float, exactly; tables make 12.0 of 12."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, float | str | Decimal):
        return None
    try:
        number = Decimal(value)
        return int(number) if abs(number) < 2**64 and number == int(number) else None
    except (ArithmeticError, ValueError):
        return None


def _tags(value: Any) -> list[str]:
    if isinstance(value, str):
        return [tag.strip() for tag in _text(value).split(",") if tag.strip()]
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return [_text(tag) for tag in value]
    raise ValueError(f"is {value!r:.80}, expected a list of texts, or one text with commas")


def check_size(width: int, height: int, where: str, cell: int = CELL) -> None:
    """Refuse a picture that does not consist of whole cells.

    Raises:
        ValueError: with the nearest sizes that do.
    """
    for side in (width, height):
        if side > MOST_PX:
            raise ValueError(f"{where}: a side of {side} pixels, expected at most {MOST_PX}: make it smaller")
        below = side - side % cell
        if side <= 0 or side % cell:
            raise ValueError(
                f"{where}: {width} x {height} pixels, of which {cell} does not divide {side}: make it "
                f"{max(below, cell)} or {max(below, 0) + cell}"
            )
