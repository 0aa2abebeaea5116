"""Safetensors files, written tensor by tensor.

Format: the length of a header in 8 bytes, the header in JSON, padded to whole words, then the tensors one after the
other. Source: github.com/huggingface/safetensors, "Format". Its own `save_file` takes tensors that are all in memory.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm

from srpo_lightning.jobs.export.weights import Stored

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
SHARD_BYTES = 10 * 10**9  # of diffusers' save_pretrained


def write_file(path: Path, tensors: Mapping[str, Stored], dtype: torch.dtype, progress: "tqdm[None]") -> None:
    """Write one file; no more than one tensor is in memory.

    Args:
        path: File to write.
        tensors: Tensors by name.
        dtype: Dtype of all tensors in the file that have none of their own.
        progress: Progress bar, which is told of each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        own = stored.dtype or dtype
        start, end = end, end + math.prod(stored.shape) * own.itemsize
        header[name] = {"dtype": NAMES[own], "shape": stored.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for stored in tensors.values():
            stream.write(as_stored(stored, dtype).flatten().view(torch.uint8).numpy().data)
            progress.update()


def as_stored(stored: Stored, dtype: torch.dtype) -> Tensor:
    """A tensor as the file holds it."""
    tensor = stored.read().to(stored.dtype or dtype)
    assert tuple(tensor.shape) == stored.shape
    return tensor


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Stored], dtype: torch.dtype) -> None:
    """Write `<stem>.safetensors`, or several files of at most `SHARD_BYTES`, with an index, as diffusers names them."""
    outlines = {
        name: torch.empty(stored.shape, dtype=stored.dtype or dtype, device="meta") for name, stored in tensors.items()
    }
    plan = split_torch_state_dict_into_shards(
        outlines, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=SHARD_BYTES
    )
    with tqdm(total=len(tensors), desc="weights", unit="tensor") as progress:
        for file, names in plan.filename_to_tensors.items():
            write_file(folder / file, {name: tensors[name] for name in names}, dtype, progress)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
