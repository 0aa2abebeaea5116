"""Context parallelism: groups of ranks that have the same samples, and each a part of their tokens.

The ranks of a group draw the same prompts and noise, and compute the same loss. Between entering and leaving the
transformer each has its own tokens, and so the part of the weights' gradient that comes through these. Strategies
average gradients over all ranks, those of a group included. Where the gradient enters the transformer it is therefore
multiplied by the size of the group: the average is that over the groups then. What leaves it again is summed over the
group and divided by its size.
"""

from typing import Any, NamedTuple

import torch.distributed._functional_collectives as collectives  # as diffusers does: they run on fake tensors too
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Context(NamedTuple):
    """The group of this rank.

    Args:
        mesh: All ranks as groups x 1 x size, of the dimensions data, ring and ulysses, which diffusers asks for.
        degree: Number of ranks of a group.
    """

    mesh: DeviceMesh
    degree: int

    @property
    def groups(self) -> list[ProcessGroup]:
        """The process groups in which its ranks exchange numbers."""
        return [*self.mesh.get_all_groups(), self.mesh["ring", "ulysses"]._flatten().get_group()]  # as diffusers asks

    def enter(self, x: Tensor) -> Tensor:
        """The same numbers, on their way into the transformer; their gradient is put together from all parts."""
        entering = x.view_as(x)
        if entering.requires_grad:
            entering.register_hook(self._summed)
        return entering

    def leave(self, output: Tensor) -> Tensor:
        """The same numbers, on their way out of it, where they are whole on every rank of the group."""
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * self.degree)
        return output.view_as(output)

    def _summed(self, gradient: Tensor) -> Tensor:
        group = self.mesh["ulysses"].get_group()
        summed = collectives.all_reduce(gradient.contiguous(), "sum", group)
        return collectives.wait_tensor(summed) / self.degree


def new_context(degree: int, num_ranks: int, device_type: str) -> Context | None:
    """Arrange the ranks, which are connected: neighbours are a group. None where each has samples of its own.

    Args:
        degree: Number of ranks of a group.
        num_ranks: Number of all ranks.
        device_type: Kind of the ranks' devices.
    """
    check_degree(degree, num_ranks)
    if degree == 1:
        return None
    mesh = init_device_mesh(device_type, (num_ranks // degree, 1, degree), mesh_dim_names=("data", "ring", "ulysses"))
    return Context(mesh, degree)


def check_degree(degree: int, num_ranks: int) -> None:
    """Refuse groups that do not come out even.

    Raises:
        ValueError: naming the degrees that do.
    """
    if num_ranks % degree:
        fitting = ", ".join(str(number) for number in range(1, num_ranks + 1) if num_ranks % number == 0)
        raise ValueError(
            f"trainer.strategy's context_parallel is {degree}, which does not divide the number of ranks, {num_ranks}: "
            f"set it to one of {fitting}"
        )


class DataRank(NamedTuple):
    """Whose samples a rank has.

    Args:
        rank: Number of its group; of ranks with samples of their own the rank itself.
        num_ranks: Number of groups.
        is_first: Whether it is the first of its group, which writes what all of them have.
    """

    rank: int
    num_ranks: int
    is_first: bool


def data_rank(trainer: Any) -> DataRank:
    """The one of this process.

    Args:
        trainer: Lightning's trainer, with its strategy.
    """
    degree = context_degree(trainer.strategy)
    group, place = divmod(trainer.global_rank, degree)
    return DataRank(group, trainer.world_size // degree, place == 0)


def context_degree(strategy: Any) -> int:
    """Number of ranks that share each sample under a strategy, or under its settings."""
    return int(getattr(strategy, "context_parallel", 1))
