"""CRC-32 of files, as fast as the memory gives them: isal's is three times as fast as zlib's."""

from typing import BinaryIO

from isal import isal_zlib

PIECE_BYTES = 1 << 22


def crc32(stream: BinaryIO, num_bytes: int) -> int:
    """The CRC-32 of the next bytes of a stream; of those that there are, where it ends before."""
    crc = 0
    while num_bytes and (piece := stream.read(min(PIECE_BYTES, num_bytes))):
        crc, num_bytes = isal_zlib.crc32(piece, crc), num_bytes - len(piece)
    return crc
