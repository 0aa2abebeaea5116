"""CRC-32 of files, as fast as the memory gives them: isal's is three times as fast as zlib's, and nothing is copied."""

import mmap
import os
from typing import BinaryIO

from isal import isal_zlib

PIECE_BYTES = 1 << 26
"""Between which a signal is heard."""


def crc32(stream: BinaryIO, num_bytes: int) -> int:
    """The CRC-32 of the next bytes of a file, whose position stays; of those that there are, where it ends before."""
    start = stream.tell()
    end = min(start + num_bytes, os.fstat(stream.fileno()).st_size)
    crc = 0
    if start < end:  # nothing cannot be mapped
        with mmap.mmap(stream.fileno(), end, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as content:
            for first in range(start, end, PIECE_BYTES):
                crc = isal_zlib.crc32(content[first : min(first + PIECE_BYTES, end)], crc)
    return crc
