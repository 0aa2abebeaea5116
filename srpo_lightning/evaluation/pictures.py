"""Pictures as files that say what they are of, and as labelled sheets."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageSequence, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.provenance import software
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.picture_statistics import evenly

DRAWN_FROM = ("prompt", "seed", "guidance", "num_steps")
"""The entries of their records in which pictures must agree to be compared."""

LABEL_PX = 14
LETTER_PX = 6  # of Pillow's own font, on average


FRAME_MS = 62
"""How long a frame of a clip is shown: Wan draws 16 in a second."""

QUALITY = 90
"""Of an animated WebP, up to 100."""

STRIP_FRAMES = 8
"""Frames of a clip that stand beside each other, at most."""


def as_picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1] in 8 bits; of a clip [3, F, H, W] frames beside each other."""
    if image.ndim == 4:
        image = torch.cat([image[:, frame] for frame in evenly(STRIP_FRAMES, image.shape[1])], dim=-1)
    return Image.fromarray((image.float().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def as_clip(image: Tensor) -> bytes:
    """Every frame of a clip [3, F, H, W] in [0, 1] as an animated WebP; nothing of an image [3, H, W]."""
    return moving([as_picture(frame) for frame in image.unbind(1)]) if image.ndim == 4 else b""


def can_move() -> bool:
    """Whether Pillow was built with WebP, which clips are written as."""
    return bool(features.check("webp"))


def moving(frames: Sequence[Image.Image], quality: int = QUALITY, frame_ms: int = FRAME_MS) -> bytes:
    """Frames as an animated WebP that starts again and again; nothing where Pillow was built without WebP."""
    if not can_move():
        return b""
    stream = io.BytesIO()
    first, *rest = frames
    first.save(stream, "WEBP", save_all=True, append_images=rest, duration=frame_ms, loop=0, quality=quality)
    return stream.getvalue()


def write_clip(path: Path, clip: bytes) -> None:
    """Save an animated WebP, complete or absent; without one, an earlier clip goes, which shows something else."""
    if clip:
        with complete_or_absent(path) as partial:
            partial.write_bytes(clip)
    else:
        path.unlink(missing_ok=True)


def clip_if_whole(path: Path, side: int | None = None) -> list[Image.Image]:
    """The frames of a clip that was written here; none if there is none, or a damaged one.

    Of frames that are alike and follow one another the file holds one, which is shown for as long.

    Args:
        path: file of the clip.
        side: pixels that the longer side of a frame has at most; larger frames are made smaller as they are read.
    """
    shown: list[Image.Image] = []
    try:
        with Image.open(path, formats=["WEBP"]) as opened:
            for frame in ImageSequence.Iterator(opened):
                shown.append(frame.convert("RGB"))
                if side is not None:
                    shown[-1].thumbnail((side, side))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return []
    return [frame for frame in shown for _ in range(max(1, round(frame.info.get("duration", 0) / FRAME_MS)))]


def moving_sheet(
    rows: Mapping[str, Sequence[Sequence[Image.Image]]], scale: int = 1, columns: Sequence[str] = ()
) -> bytes:
    """A contact sheet of clips, as an animated WebP; a shorter clip ends with its last frame.

    Args:
        rows: Frames of each clip by the name of their row; one without frames leaves a place empty.
        scale: Whole number that pictures are enlarged by.
        columns: Texts that stand over the columns.
    """
    length = max(len(clip) for row in rows.values() for clip in row)
    sheets = []
    for number in range(length):
        at = {name: [clip[min(number, len(clip) - 1)] if clip else None for clip in row] for name, row in rows.items()}
        sheets.append(contact_sheet(at, scale, columns))
    return moving(sheets)


def write_picture(path: Path, picture: Image.Image, record: Mapping[str, Any]) -> None:
    """Save a PNG, complete or absent, with its record in its metadata: the prompt in `prompt`, all in `srpo`."""
    info = PngInfo()
    info.add_itxt("prompt", str(record["prompt"]))
    info.add_itxt("srpo", strict_json({**record, "software": software()}))
    with complete_or_absent(path) as partial:  # two ranks may have drawn the same one
        picture.save(partial, format="PNG", pnginfo=info)


def read_record(path: Path) -> dict[str, Any]:
    """The record in a picture."""
    with Image.open(path) as picture:
        content: dict[str, Any] = json.loads(picture.info["srpo"])
    return content


def record_if_whole(path: Path) -> dict[str, Any] | None:
    """The record in a picture; None if there is no picture, or one that is damaged or not of this project."""
    try:
        with Image.open(path) as picture:
            picture.verify()  # the sum of every part
        record = read_record(path)
    except (OSError, SyntaxError, KeyError, ValueError, struct.error, Image.DecompressionBombError):
        return None
    return record if isinstance(record, dict) else None


def picture_if_whole(path: Path, of: Mapping[str, Any] | None = None) -> Image.Image | None:
    """A picture that was written here; None if there is none, or a damaged one, which is said.

    Args:
        of: Record of the picture that it is to stand beside; a picture of something else counts as none.
    """
    if not path.is_file():
        return None
    record = record_if_whole(path)
    if record is None:
        rank_zero_warn(f"picture {path} is damaged: its place stays empty")
    if record is None or (of and any(record.get(name) != of[name] for name in DRAWN_FROM)):
        return None
    with Image.open(path) as picture:
        return picture.convert("RGB")


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]], scale: int = 1, columns: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures, each under its name; None leaves a place empty.

    Args:
        rows: Pictures of one size, or smaller ones, by the name of their row.
        scale: Whole number that pictures are enlarged by; their pixels stay square.
        columns: Texts that stand over the columns.
    """
    sizes = [picture.size for row in rows.values() for picture in row if picture is not None]
    width, height = (scale * max(side) for side in zip(*sizes, strict=True))
    num_columns, top = max(map(len, rows.values())), LABEL_PX if columns else 0
    sheet = Image.new("RGB", (num_columns * width, top + len(rows) * (height + LABEL_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(columns):
        draw.text((column * width + 2, 1), text[: width // LETTER_PX], fill="gray")
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (height + LABEL_PX)
        draw.text((2, y + 1), name, fill="black")
        for column, picture in enumerate(pictures):
            if picture is not None:
                large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
                sheet.paste(large, (column * width, y + LABEL_PX))
    return sheet
