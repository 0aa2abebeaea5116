"""Pictures and webdatasets for tests."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def picture(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Files in their order; a name may come twice."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
