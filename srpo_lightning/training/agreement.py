"""What all ranks of a run have in common: compared before it counts, and told when a rank no longer answers."""

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

SMALL = 1 << 24
"""Bytes up to which a file of a sharded checkpoint is looked at whole; larger ones hold tensors."""

LOST = ("gloo/transport", "monitoredBarrier", "Connection closed by peer", "Connection reset by peer")
"""What torch's messages of a rank that does not answer have in common, where they have no type of their own."""


class Fact(NamedTuple):
    """What one rank has found, and every rank should have.

    Args:
        value: Text that is compared.
        told: Form of it that a person can tell apart.
        cure: Advice for ranks that differ.
        group: Number that ranks share which are compared; the parts of a copy that is divided differ.
    """

    value: str
    told: str
    cure: str
    group: int = 0


def check_agreement(facts: Mapping[str, Fact]) -> None:
    """Compare the facts of all ranks, by name. Every rank calls this, at the same place; one process has no others.

    Raises:
        ValueError: the same line on every rank, with the first fact in which ranks differ, and which ones.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, dict(facts))
    line = disagreement(found)
    if line:
        raise ValueError(line)


def disagreement(found: Sequence[Mapping[str, Fact]]) -> str | None:
    """In one line the first fact in which ranks differ from the first of their group; None where they agree.

    Args:
        found: Facts of each rank.
    """
    for name in dict.fromkeys(name for facts in found for name in facts):
        cure = next(facts[name].cure for facts in found if name in facts)
        first: dict[int, int] = {}
        own = [facts.get(name, Fact("", "nothing", cure)) for facts in found]
        odd = [rank for rank, fact in enumerate(own) if own[first.setdefault(fact.group, rank)].value != fact.value]
        if odd:
            rank, reference = odd[0], first[own[odd[0]].group]
            too = f" (and so do ranks {', '.join(map(str, odd[1:]))})" if odd[1:] else ""
            return (
                f"rank {rank} differs from rank {reference} in the {name}: {own[rank].told} instead of "
                f"{own[reference].told}{too}; {cure}"
            )
    return None


def digest(parts: Iterable[str]) -> str:
    """A function of all texts and their order, as a word."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:16]


def identity_of_checkpoint(path: Path) -> str:
    """A function of a checkpoint's content, from the sums that its archive keeps of each tensor: nothing large is read.

    Of a sharded one, which has no such sums, the small files are read, and of the large ones the names and sizes.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        large = digest(f"{file.name} {file.stat().st_size}" for file in files)
        small = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.stat().st_size <= SMALL))
        return large + small.hexdigest()
    with zipfile.ZipFile(path) as archive:
        return digest(f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in archive.infolist())


def check_weights(policy: nn.Module, reward: nn.Module, mesh: DeviceMesh | None) -> None:
    """Compare the weights of all ranks; one process has no others.

    Args:
        policy: Module whose parameters that require a gradient are trained.
        reward: Frozen module.
        mesh: Layout of a strategy that divides the policy; None: every rank has all of it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    kinds: dict[str, list[Tensor]] = {
        "trained weights": [p for p in policy.parameters() if p.requires_grad],
        "frozen weights of the policy": [t for t in (*policy.parameters(), *policy.buffers()) if not t.requires_grad],
        "weights of the reward": [*reward.parameters(), *reward.buffers()],
    }
    check_agreement(weights_of(kinds, mesh["shard"].get_local_rank() if mesh else 0))


def weights_of(kinds: Mapping[str, Iterable[Tensor]], part: int) -> dict[str, Fact]:
    """The sums of weights by what they are; those that a strategy divides apart from those that each rank has whole.

    Args:
        kinds: Tensors by a name for them.
        part: Number of the part of a divided copy that this rank has.
    """
    facts = {}
    for kind, tensors in kinds.items():
        whole: list[Tensor] = []
        divided: list[Tensor] = []
        for tensor in tensors:
            if not tensor.is_meta:
                (divided if isinstance(tensor, DTensor) else whole).append(tensor)
        for name, own, group in ((kind, whole, 0), (f"{kind}, of which each has a part", divided, part)):
            if own:
                value = digest(map(str, torch.stack([checksum(tensor).cpu() for tensor in own]).tolist()))
                cure = "every rank must read the same files: copy them again where they differ"
                facts[name] = Fact(value, f"a sum of {value[:8]}", cure, group)
    return facts


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes, eight at a time and modulo 2^64: any flipped bit changes it. Of a shard, its own."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = own.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    end = len(flat) // 8 * 8
    return flat[:end].view(torch.int64).sum() + flat[end:].sum()


def lost_rank(error: BaseException) -> str | None:
    """One line, if an error means that another rank has died, or has not answered in time."""
    is_lost = isinstance(error, distributed.DistError) or any(mark in str(error) for mark in LOST)
    if not isinstance(error, RuntimeError) or not is_lost:
        return None
    first = " ".join(str(error).partition("\n")[0].split())
    return (
        "another rank has ended, or has not answered within trainer.strategy's timeout_minutes: its own output says "
        f"why. Start all ranks again, with --ckpt_path last where the run has a checkpoint ({first[:200]})"
    )
