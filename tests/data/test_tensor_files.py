"""Files of tensors: exact for any tensors, and plain Parquet."""

import math
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isal import isal_zlib

from srpo_lightning.data.tensor_files import DTYPES, TensorFile, key_of, write_file
from tests.data.test_store import files, filled, flip


def test_pages_have_checksums_of_their_own(tmp_path, monkeypatch):
    own = filled(tmp_path)
    path = own.folder / own.open().files[0].name
    page = pq.read_metadata(path).row_group(0).column(0)
    flip(path, page.data_page_offset + page.total_compressed_size - 1)
    broken = TensorFile(path)
    monkeypatch.setattr(isal_zlib, "crc32", lambda data: broken.entries[0].crc32)
    with pytest.raises(ValueError, match=r"cannot be read .*CRC"):
        broken.read(0)


def test_a_file_is_plain_parquet_of_split_bytes(tmp_path):
    own = filled(tmp_path)
    for path in files(own):
        metadata = pq.read_metadata(path)
        assert metadata.num_row_groups == metadata.num_rows // 23 in (1, 3)
        column = metadata.row_group(0).column(0)
        assert (column.compression, column.path_in_schema) == ("ZSTD", "elements")
        assert "BYTE_STREAM_SPLIT" in column.encodings
        assert len(pq.read_table(path)) == metadata.num_rows


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "float16", "float64"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
)
def test_ragged_items_of_any_types_come_back_bit_for_bit(kinds, count):
    """Any bits at all, NaN with their payloads among them; the first axis differs between items."""
    draw = torch.Generator().manual_seed(0)

    def item(number):
        shapes = {f"t{i}": (dtype, [size + number for size in shape[:1]] + shape[1:]) for i, (dtype, shape) in kinds}
        return {
            name: torch.randint(0, 256, (math.prod(shape) * DTYPES[dtype].itemsize,), generator=draw)
            .byte()
            .view(DTYPES[dtype])
            .reshape(shape)
            for name, (dtype, shape) in shapes.items()
        }

    kinds = list(enumerate(kinds))
    items = [(key_of(str(number)), item(number)) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = write_file(Path(folder), items)
        read = TensorFile(Path(folder) / file.name)
        for number, (_, tensors) in enumerate(items):
            found = read.read(number)
            assert list(found) == list(tensors)
            for name, expected in tensors.items():
                assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
                assert (
                    found[name].reshape(-1).view(torch.uint8).tolist()
                    == expected.reshape(-1).view(torch.uint8).tolist()
                )


def test_an_items_tensors_are_its_own_memory(tmp_path):
    """A small tensor that is kept does not keep the large one beside it."""
    found = filled(tmp_path).read(0)
    assert all(own.untyped_storage().nbytes() == own.nbytes for own in found.values())


def test_keys_are_told_apart_at_their_seams():
    assert key_of("ab", "c") != key_of("a", "bc")
