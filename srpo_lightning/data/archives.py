"""Samples of a webdataset, an uncompressed .tar, read where they lie."""

import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from srpo_lightning.data.picture_files import PICTURES, is_hidden, part_of
from srpo_lightning.data.tables import CAPTION_BYTES, Found, Row, object_of

END_BYTES = 1 << 24
"""The most that is looked at behind the last sample."""

NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class Header(tarfile.TarInfo):
    """What an archive says of its next file; names and notes, which tarfile reads as long as they say, have a limit."""

    @classmethod
    def frombuf(cls, *args: Any, **kwargs: Any) -> "Header":
        """From its bytes."""
        own = super().frombuf(*args, **kwargs)
        if own.type in NAMES and own.size > CAPTION_BYTES:
            raise tarfile.ReadError(f"a name or note of {own.size} bytes, at most {CAPTION_BYTES} are read")
        return own


def archive_rows(file: Path, prompt: str, image: str) -> Iterator[Found]:
    """The samples of an archive: files of one sample share their name up to its first dot and follow one another.

    Args:
        file: the archive.
        prompt: the key of what stands in .txt files.
        image: the key of pictures, as `picture_files.part_of` writes them.

    Raises:
        ValueError: naming the file and the cure, if the archive is damaged, cut off, or holds what cannot be read.
    """
    file = file.resolve()
    try:
        with tarfile.open(file, "r:", tarinfo=Header) as archive:
            for name, members in groupby(_members(archive, file), _sample):
                yield Found(_row(archive, file, members, prompt, image), str(file), name, "sample")
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"prompt file {file}: not an uncompressed tar archive, or a damaged one ({error}); write it anew"
        ) from error


def _members(archive: tarfile.TarFile, file: Path) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # documented nowhere, and there since ever: the list of all would take a kilobyte each
        kind = _kind(member)
        if member.isdir() or is_hidden(member.name) or (f".{kind}" not in PICTURES and kind not in ("txt", "json")):
            continue
        place = f"prompt file {file}, {member.name}"
        if not member.isreg() or member.issparse():
            raise ValueError(
                f"{place} is a link, a device or a sparse file: write the archive of regular files, "
                "tar --hard-dereference -h"
            )
        if f".{kind}" not in PICTURES and member.size > CAPTION_BYTES:
            raise ValueError(f"{place} has {member.size} bytes, at most {CAPTION_BYTES} are read: shorten it")
        yield member


def _kind(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _sample(member: tarfile.TarInfo) -> str:
    folder, slash, base = member.name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _row(archive: tarfile.TarFile, file: Path, members: Iterable[tarfile.TarInfo], prompt: str, image: str) -> Row:
    row, captions, pictures = Row(), list[str](), list[tarfile.TarInfo]()
    for member in members:
        place = f"prompt file {file}, {member.name}"
        kind = _kind(member)
        if f".{kind}" in PICTURES:
            pictures.append(member)
            continue
        stream = archive.extractfile(member)
        assert stream is not None
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is not UTF-8 text: save it as UTF-8") from error
        if kind == "json":
            row |= object_of(text, place)
        else:
            captions.append(text)
        if len(captions) > 1 or (captions and prompt in row and row[prompt] != captions[0]):
            raise ValueError(f"{place} is a second caption of its sample: keep one")
    if len(pictures) > 1:
        raise ValueError(
            f"prompt file {file}: {pictures[0].name} and {pictures[1].name} are pictures of one sample: keep one"
        )
    if captions:
        row[prompt] = captions[0]
    if pictures:
        row[image] = part_of(file, pictures[0].offset_data, pictures[0].size)
    return row


def _check_end(file: Path, offset: int) -> None:
    """Behind the last file of an archive are zeros; tarfile takes anything that is no header for the end."""
    with file.open("rb") as stream:
        stream.seek(offset)
        rest = stream.read(END_BYTES + 1)
    if len(rest) < tarfile.BLOCKSIZE:
        raise ValueError(f"prompt file {file} is cut off after byte {offset}: copy or write it anew")
    if len(rest) > END_BYTES or rest.strip(b"\0"):
        raise ValueError(
            f"prompt file {file}: from byte {offset} on it is damaged, or another archive was appended: "
            "write it anew, as one archive"
        )
