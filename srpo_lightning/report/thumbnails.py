"""Pictures small enough to stand in a page, of which a page holds a bounded number."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, features

from srpo_lightning.evaluation.pictures import FRAME_MS, clip_if_whole, moving, picture_if_whole
from srpo_lightning.run_folder import beside

SIDE_PX = 256
MAX_BYTES = 16 << 10
"""Size of a thumbnail at most."""

CLIP_SHARE = 4
MAX_CLIP_BYTES = CLIP_SHARE * MAX_BYTES
"""Size of a moving thumbnail at most, which counts as so many others."""

MAX_FRAMES = 32
"""Frames of a moving thumbnail at most: of more every second, third or later one is shown."""

MAX_PICTURES = 640
"""Number of thumbnails in a page at most: with MAX_BYTES each and base64's 4/3, 14 MB."""

MAX_PROMPTS = 64
QUALITIES = (85, 70, 50, 30)

Item = TypeVar("Item")


class Thumbnails:
    """Data URIs of pictures; those of the page before are kept, so that a page costs what is new in it."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[int, str]] = {}
        self._used: set[Path] = set()

    def url(self, path: Path) -> str:
        """A picture as a data URI, moving where a clip lies beside it; empty where there is none, or a damaged one."""
        if not path.is_file():
            return ""
        self._used.add(path)
        changed = path.stat().st_mtime_ns
        if path not in self._kept or self._kept[path][0] != changed:
            picture = picture_if_whole(path)
            frames = clip_if_whole(beside(path)) if picture else []
            shown = moving_uri(frames) if frames else ""
            self._kept[path] = changed, shown or (data_uri(picture) if picture else "")
        return self._kept[path][1]

    def forget_unused(self) -> None:
        """Forget what was not asked for since the last call."""
        self._kept = {path: own for path, own in self._kept.items() if path in self._used}
        self._used = set()


def data_uri(picture: Image.Image) -> str:
    """A picture of at most SIDE_PX and MAX_BYTES, as WebP, or as JPEG where Pillow was built without."""
    kind = "WEBP" if features.check("webp") else "JPEG"
    side = SIDE_PX
    while True:
        small = picture.copy()
        small.thumbnail((side, side))
        for quality in QUALITIES:
            stream = io.BytesIO()
            small.save(stream, kind, quality=quality)
            if stream.tell() <= MAX_BYTES:
                return as_uri(kind.lower(), stream.getvalue())
        side //= 2


def moving_uri(frames: Sequence[Image.Image]) -> str:
    """A clip of at most SIDE_PX, MAX_FRAMES and MAX_CLIP_BYTES, as an animated WebP."""
    stride = -(-len(frames) // MAX_FRAMES)
    side = SIDE_PX
    while True:
        small = [frame.copy() for frame in frames[::stride]]
        for frame in small:
            frame.thumbnail((side, side))
        for quality in QUALITIES:
            clip = moving(small, quality, stride * FRAME_MS)
            if len(clip) <= MAX_CLIP_BYTES:
                return as_uri("webp", clip)
        side //= 2


def as_uri(kind: str, content: bytes) -> str:
    """A picture's file as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many items, two or more, evenly: the first, the last, and every so many; all, where they are few."""
    last, stride = len(items) - 1, 1
    while stride < last and -(-last // stride) + 1 > most:
        stride *= 2
    return [*items[:last:stride], *items[last:]] if items else []
