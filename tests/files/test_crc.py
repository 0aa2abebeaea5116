import tracemalloc
import zlib

import pytest

from srpo_lightning.files import crc
from srpo_lightning.files.crc import crc32


@pytest.mark.parametrize("start", [0, 1, 5000])
@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 9999, 20_000])
def test_it_is_zlibs_sum_of_the_bytes_that_are_there(tmp_path, monkeypatch, start, num_bytes):
    """In pieces, from anywhere, to beyond the end, and of an empty file."""
    monkeypatch.setattr(crc, "PIECE_BYTES", 4096)
    content = bytes(i * i % 251 for i in range(10_000))
    for name, written in (("file", content), ("empty", b"")):
        (tmp_path / name).write_bytes(written)
        with (tmp_path / name).open("rb") as stream:
            stream.seek(start)
            assert crc32(stream, num_bytes) == zlib.crc32(written[start : start + num_bytes])


def test_nothing_is_copied(tmp_path):
    """To copy takes longer than to sum, and a checkpoint is checked in a tenth of the time in which it is written."""
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    tracemalloc.start()
    try:
        with path.open("rb") as stream:
            crc32(stream, 16 << 20)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 18
