"""Given pictures with their prompts, for commands that measure a reward on them."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from srpo_lightning.batch import Size
from srpo_lightning.data.colours import as_seen, size_as_seen
from srpo_lightning.data.files import rows
from srpo_lightning.data.picture_files import LIMITS, OPENED, PICTURES, Limits, is_hidden
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.evaluation.pictures import record_if_whole


class Picture(NamedTuple):
    """A picture file, what it is of, and as what it is seen.

    Args:
        path: File of the picture.
        prompt: Prompt of the picture.
        size: Height and width in pixels.
        limits: Limits up to which it is read.
    """

    path: Path
    prompt: str
    size: Size
    limits: Limits


def read_pictures(folder: str, prompts: str, limits: Limits = LIMITS) -> list[Picture]:
    """The pictures of a folder, in the order of their names, with their prompts.

    Raises:
        ValueError: naming the cure, if there are fewer than two, one cannot be shown or is of a clip, or prompts do not
            fit.
    """
    files = Path(folder).expanduser().glob("*")
    paths = sorted(path for path in files if path.suffix.lower() in PICTURES and not is_hidden(path.name))
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} pictures ({', '.join(OPENED)}): two is the least, better 100")
    for path in paths:
        if "num_frames" in (record_if_whole(path) or {}):
            raise ValueError(
                f"{path} is a strip of a clip's frames, and rewards are measured on pictures here: give a folder of "
                "pictures, such as the samples of a run with num_frames 1"
            )
    by_file = _by_file(Path(prompts).expanduser())
    if by_file is not None:
        missing = [str(path) for path in paths if path.resolve() not in by_file]
        if missing:
            raise ValueError(f"{prompts} names no prompt for {missing[0]} and {len(missing) - 1} other pictures")
        return [Picture(path, by_file[path.resolve()], size_as_seen(str(path), limits), limits) for path in paths]
    texts = read_prompts(prompts).prompts
    if len(texts) != len(paths):
        raise ValueError(
            f"{prompts} holds {len(texts)} prompts and {folder} {len(paths)} pictures: give one prompt for each "
            "picture in the order of their names, or a .jsonl with keys `file` and `prompt`"
        )
    pairs = zip(paths, texts, strict=True)
    return [Picture(path, text, size_as_seen(str(path), limits), limits) for path, text in pairs]


def _by_file(prompts: Path) -> dict[Path, str] | None:
    if prompts.suffix != ".jsonl" or not prompts.is_file():
        return None
    records = [found.row for found in rows(str(prompts), "prompt", "file", "train")]
    records = [record for record in records if record != {"prompt": ""}]  # empty lines
    if not all({"file", "prompt"} <= record.keys() for record in records):
        return None
    for record in records:
        for key in ("file", "prompt"):
            if not isinstance(record[key], str):
                raise ValueError(f"{prompts}: {key} is {record[key]!r:.80}, expected a text")
    return {(prompts.parent / record["file"]).resolve(): record["prompt"] for record in records}


def batches(pictures: Sequence[Picture], batch_size: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Pictures of one size together, [B, 3, H, W] in [0, 1]."""
    size = attrgetter("size")
    for _, group in groupby(sorted(pictures, key=size), key=size):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            images = [np.array(as_seen(str(picture.path), picture.limits)) for picture in batch]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, [picture.prompt for picture in batch]
