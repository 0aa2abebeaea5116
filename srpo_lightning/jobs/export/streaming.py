"""Safetensors files, written tensor by tensor.

Format: the length of a header in 8 bytes, the header in JSON, padded to whole words, then the tensors one after the
other. Source: github.com/huggingface/safetensors, "Format".
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from srpo_lightning.jobs.export.weights import Stored

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
SHARD_BYTES = 10 * 10**9  # of diffusers' save_pretrained


def write_file(path: Path, tensors: Mapping[str, Stored], dtype: torch.dtype, progress: "tqdm[None]") -> None:
    """Write one file; no more than one tensor is in memory.

    Args:
        path: of the file.
        tensors: by name.
        dtype: of all of them in the file.
        progress: is told of each tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + math.prod(stored.shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": stored.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for stored in tensors.values():
            stream.write(as_stored(stored, dtype).flatten().view(torch.uint8).numpy().data)
            progress.update()


def as_stored(stored: Stored, dtype: torch.dtype) -> Tensor:
    """A tensor as the file holds it."""
    tensor = stored.read().to(dtype)
    assert tuple(tensor.shape) == stored.shape
    return tensor


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Stored], dtype: torch.dtype) -> None:
    """Write `<stem>.safetensors`, or several files of at most `SHARD_BYTES`, with an index, as diffusers names them."""
    shards: list[dict[str, Stored]] = [{}]
    total = room = 0
    for name, stored in tensors.items():
        size = math.prod(stored.shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
        room = (room if shards[-1] else SHARD_BYTES) - size
        shards[-1][name] = stored
        total += size
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    with tqdm(total=len(tensors), desc="weights", unit="tensor") as progress:
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard, dtype, progress)
    if count > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
