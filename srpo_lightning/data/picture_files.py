"""Files of pictures and parts of archives that are pictures: which there are, and their bytes."""

import hashlib
import stat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from srpo_lightning.files.checkpoints import complete_or_absent

OPENED = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".tga")
PICTURES = (*OPENED, ".apng", ".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".hdr")
"""What takes part as a picture; one that Pillow cannot open, or not as it is seen, is then refused by name."""
ARRAYS = (".npy", ".npz")
"""What takes part as a clip where it has a caption; beside a picture it may be what another program keeps of it."""

KEPT = Path(".cache/pictures")
SLICE = "@"  # between an archive's path and where in it a picture lies
MEGA = 10**6


class Limits(NamedTuple):
    """Up to where a picture is read.

    Args:
        megapixels: width times height.
        megabytes: of the file.
        group: what stands before the names of the settings that raise these.
    """

    megapixels: int = 100
    megabytes: int = 200
    group: str = "data."


LIMITS = Limits()


def is_hidden(name: str) -> bool:
    """Whether a path within a folder or an archive is what programs leave there for themselves."""
    return any(part == "__MACOSX" or part[0] == "." for part in PurePosixPath(name).parts)


def part_of(archive: Path, start: int, size: int) -> str:
    """The reference to a picture inside an archive."""
    return f"{archive}{SLICE}{start}+{size}"


def read_picture(reference: str, limits: Limits = LIMITS) -> bytes:
    """The bytes of a picture: a file's, or those of a part of an archive.

    Raises:
        ValueError: naming the file and the cure, if it cannot be read, is no regular file or is too large.
    """
    path, _, place = reference.rpartition(SLICE)
    start, _, size = place.partition("+")
    if not (path.endswith(".tar") and start.isdecimal() and size.isdecimal()):
        path, start, size = reference, "0", ""
    try:
        told = Path(path).stat()
        if not stat.S_ISREG(told.st_mode):  # a pipe or a device may have no end
            raise ValueError(f"picture {reference} is no regular file: name a picture's file")
        num_bytes = int(size or told.st_size)
        if num_bytes > limits.megabytes * MEGA:
            raise ValueError(
                f"picture {reference} has {num_bytes / MEGA:.0f} MB, more than {limits.group}max_picture_megabytes "
                f"({limits.megabytes}): raise that, or leave the picture out"
            )
        with Path(path).open("rb") as stream:
            stream.seek(int(start))
            content = stream.read(num_bytes)
    except OSError as error:
        raise ValueError(f"picture {reference} cannot be read ({error.strerror}): correct its path") from error
    if len(content) < num_bytes:
        raise ValueError(f"picture {reference} ends after {len(content)} of {num_bytes} bytes: copy it anew")
    return content


def keep_picture(content: bytes) -> str:
    """Write a picture that came inside a table to a file named by its content; returns the path."""
    path = (KEPT / hashlib.sha256(content).hexdigest()).resolve()
    if not path.is_file():
        with complete_or_absent(path) as partial:
            partial.write_bytes(content)
    return str(path)
