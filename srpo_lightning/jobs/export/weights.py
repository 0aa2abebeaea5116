"""What a checkpoint makes of the transformer, tensor by tensor, each read when it is asked for."""

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from srpo_lightning.callbacks.lora import PREFIX
from srpo_lightning.files.checkpoints import METADATA
from srpo_lightning.files.pretrained import safetensors_files, stream_into
from srpo_lightning.files.sharded_checkpoint import SafeReader, read_alone
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import adapters
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.loading import STEM

Kind = Literal["ema", "policy"]
"""The weights in a checkpoint: the ema, or the policy."""


class Stored(NamedTuple):
    """A tensor that is not in memory.

    Args:
        shape: Shape of the tensor.
        read: Function that brings it into memory.
        dtype: Dtype that it is kept in, whatever others are; None: theirs.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dtype: torch.dtype | None = None


def read_trained(path: Path, kind: Kind, module: SRPOModule) -> dict[str, Stored]:
    """The trained tensors of a checkpoint, by their names in the transformer.

    Args:
        path: File of a checkpoint, or folder of a sharded one; optimizer states are not read.
        kind: Kind of its weights.
        module: Module that the checkpoint is of, its transformer in outline; is told the step.

    Raises:
        ValueError: naming the cure, if it is another module's, damaged, or without these weights.
    """
    key = "state_dict" if kind == "policy" else "ema"
    rest, tensors = (_sharded if path.is_dir() else _file)(path, key)
    outlines = {name: torch.empty(stored.shape, device="meta") for name, stored in tensors.items()}
    module.on_load_checkpoint(rest | ({"state_dict": outlines} if outlines else {}))
    if not tensors:
        raise ValueError(
            f"{path} holds no {kind}: "
            + ("export --weights policy, or train with the callback EMA" if kind == "ema" else "give another one")
        )
    return {name.removeprefix(PREFIX): stored for name, stored in tensors.items()}


def whole_transformer(policy: FlowPolicy, outline: nn.Module, trained: Mapping[str, Stored]) -> dict[str, Stored]:
    """All tensors of the transformer by diffusers' names; adapters are in the weights beside which they were trained.

    A base that was kept in 4 bits is read as it was before. Where all weights were trained, none of the base is read.
    """
    lora = policy.adapter
    if lora is None and trained.keys() >= adapters.base_tensors(outline).keys():
        return dict(trained)
    base = base_transformer(policy, outline)
    if lora is None:
        return base | dict(trained)  # what no gradient reaches is as it was

    def read(name: str) -> Tensor:
        weight = base[name].read()
        prefix = f"{name.removesuffix('.weight')}.lora_"
        own = {other: stored.read() for other, stored in trained.items() if other.startswith(prefix)}
        return adapters.merged(weight, lora, own) if own else weight

    return {name: Stored(stored.shape, partial(read, name)) for name, stored in base.items()}


def base_transformer(policy: FlowPolicy, outline: nn.Module) -> dict[str, Stored]:
    """The weights before training, beside which an adapter was trained, by diffusers' names."""
    files = safetensors_files(*policy.start_place, STEM)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        weight = torch.empty(shape, dtype=policy.dtype)
        stream_into({name: weight}, {name: files[name]})
        return weight

    named = adapters.base_tensors(outline)
    return {name: Stored(tuple(p.shape), partial(read, name, tuple(p.shape))) for name, p in named.items()}


def _file(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: give another one, or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, no checkpoint: give one out of a run's checkpoints/"
        )
    tensors: dict[str, Tensor] = content.get(key, {})
    found = {name: Stored(tuple(tensor.shape), partial(_same, tensor)) for name, tensor in tensors.items()}
    return {name: value for name, value in content.items() if name != "state_dict"}, found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _sharded(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    if not (path / METADATA).is_file():
        raise ValueError(f"{path} is no checkpoint ({METADATA} is missing): give one out of a run's checkpoints/")
    reader = SafeReader(path)
    found = {
        name.removeprefix(f"{key}."): Stored(tuple(own.size), partial(_gathered, reader, name, own))
        for name, own in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"{key}.") and isinstance(own, TensorStorageMetadata)
    }
    return torch.load(path / METADATA, weights_only=True), found


def _gathered(reader: SafeReader, name: str, own: TensorStorageMetadata) -> Tensor:
    """One tensor from all ranks' parts of it."""
    tensor = torch.empty(own.size, dtype=own.properties.dtype)
    read_alone({name: tensor}, reader)
    return tensor
