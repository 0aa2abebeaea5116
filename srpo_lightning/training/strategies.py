"""FSDP2 as a Lightning strategy: parameters sharded block by block, checkpoints complete or absent. And DDP."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_gather_object, get_world_size
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # a mesh takes no timeout, a group gets none later
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from srpo_lightning.files.checkpoints import METADATA, begin_folder, finish_folder
from srpo_lightning.files.full_disk import FullDiskError, room_for
from srpo_lightning.files.owners import partial_path
from srpo_lightning.files.sharded_checkpoint import INDEX, SafeReader, read_into, sums_of, write_sums
from srpo_lightning.training.context import Context, new_context

PARAMETER_LIKE = ("ema",)
"""Keys of a checkpoint that hold tensors by parameter name, sharded as the parameters are."""

TIMEOUT_MINUTES = 10.0
"""How long ranks wait for one that is late before they take it for dead."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over `shard_size` ranks, repeated `replicate_size` times.

    Parameters, gradients, optimizer states and averages are divided over the ranks of one copy; with bf16-mixed
    precision the parameters travel in bfloat16 and their gradients are summed in float32, on float32 masters. Several
    copies (hybrid sharding, usually one per node) gather parameters within a copy and average gradients between them.
    Both sizes are given, and their product must be the number of ranks.

    Args:
        shard_size: Number of ranks that share one copy of the weights.
        replicate_size: Number of copies of the weights.
        cpu_offload: Whether parameters, gradients and optimizer states stay in host memory; slower.
        reshard_after_forward: Whether each block's gathered parameters are freed after its forward pass. If not, they
            stay from the first step of a rollout to the backward pass: each is gathered once per micro-batch.
        timeout_minutes: Minutes that ranks wait for one that is late, at the start as well; then they end. A rank may
            need that much longer than the others to read its weights, or to write its part of a checkpoint.
        context_parallel: Number of ranks that share each sample, each with its part of the tokens, for pictures whose
            activations one device does not hold. It divides the number of ranks, the attention heads and the tokens.
    """

    def __init__(
        self,
        shard_size: PositiveInt,
        replicate_size: PositiveInt = 1,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        timeout_minutes: PositiveFloat = TIMEOUT_MINUTES,
        context_parallel: PositiveInt = 1,
    ) -> None:
        self.timeout = timedelta(minutes=timeout_minutes)
        super().__init__(data_parallel_size=shard_size * replicate_size, tensor_parallel_size=1, timeout=self.timeout)
        self.shard_size = shard_size
        self.replicate_size = replicate_size
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.context_parallel = context_parallel
        self.mesh: DeviceMesh | None = None
        self.context: Context | None = None

    def setup_environment(self) -> None:
        """Connect the ranks."""
        world_size = self.num_nodes * self.num_processes
        if self.shard_size * self.replicate_size != world_size:
            raise ValueError(
                f"shard_size {self.shard_size} x replicate_size {self.replicate_size} is not the number of ranks, "
                f"{world_size}: set their product to it, for instance shard_size {world_size} and replicate_size 1"
            )
        super().setup_environment()
        self.make_mesh(self.root_device.type)
        assert self.mesh is not None
        wait(self.timeout, *self.mesh.get_all_groups(), *(self.context.groups if self.context else ()))

    def make_mesh(self, device_type: str) -> None:
        """Arrange the ranks, which are connected: copies in rows."""
        sizes, names = (self.replicate_size, self.shard_size), ("replicate", "shard")
        self.mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        self.context = new_context(self.context_parallel, self.mesh.size(), device_type)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Divide the model's parameters, gathered block by block when it runs."""
        assert self.mesh is not None, "setup_environment() comes first"
        is_cuda = self.root_device.type == "cuda"
        is_mixed = self.precision_plugin.precision == "bf16-mixed"
        settings: dict[str, Any] = {
            "mesh": self.mesh if self.replicate_size > 1 else self.mesh["shard"],
            "reshard_after_forward": self.reshard_after_forward,
            # Inputs stay as they are: autocast rounds where it should, and noise levels not at all.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if is_mixed else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=is_cuda) if self.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, **settings)
        fully_shard(model, **settings)
        device = "cpu" if self.cpu_offload else self.root_device
        made = [(own, *named) for own in model.modules() for named in own.named_buffers(recurse=False)]
        model.to_empty(device=device)
        for owner, name, buffer in made:  # what a model computes when it is made, no file holds
            if not buffer.is_meta:
                setattr(owner, name, buffer.to(device))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Every rank writes its part beside the final name; when all have, the folder gets it."""
        if storage_options is not None:
            raise TypeError("ShardedStrategy writes to folders and takes no storage_options")
        path = Path(self.broadcast(str(filepath)))
        partial = Path(self.broadcast(str(partial_path(path))))
        with full_for_all(path, partial):
            if self.is_global_zero:
                begin_folder(path)
        sharded = {"state_dict": checkpoint.pop("state_dict")}
        sharded |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        sharded |= {key: checkpoint.pop(key) for key in PARAMETER_LIKE if key in checkpoint}
        with full_for_all(path, partial):
            save(sharded, checkpoint_id=partial)
        sums = self._gathered(sums_of(partial.glob(f"__{self.global_rank}_*")))
        with full_for_all(path, partial):
            if self.is_global_zero:
                torch.save(checkpoint, partial / METADATA)
                write_sums(partial, sums | sums_of([partial / METADATA, partial / INDEX]))
                finish_folder(partial, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Each rank reads its part, whatever number of ranks wrote it."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        # Refuses a checkpoint of another policy before its tensors are asked for.
        whole = torch.load(path / METADATA if path.is_dir() else path, mmap=True, map_location="cpu", weights_only=True)
        self.lightning_module.on_load_checkpoint(whole)
        checkpoint = self._read_folder(path) if path.is_dir() else super().load_checkpoint(path, weights_only)
        parameters = dict(self.lightning_module.named_parameters())
        for key in PARAMETER_LIKE:
            if path.is_dir():
                checkpoint[key] = self._own_parts(path, key, parameters)
            else:
                tensors = whole.get(key, {})
                checkpoint[key] = {name: _distributed_like(parameters[name], t) for name, t in tensors.items()}
        return checkpoint

    def _gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{}] * self.world_size
        all_gather_object(parts, own)
        return {name: value for part in parts for name, value in part.items()}

    def _read_folder(self, path: Path) -> dict[str, Any]:
        """As Lightning does, which would run pickles on the way."""
        assert self.model is not None
        assert self.lightning_module is not None
        weights = {"state_dict": get_model_state_dict(self.model)}
        read_into(weights, path)
        self.model.load_state_dict(weights["state_dict"], strict=self.lightning_module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = {key: get_optimizer_state_dict(self.model, optimizer)}
            read_into(state, path)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[key], options=options)
        return dict(torch.load(path / METADATA, weights_only=True))

    def _own_parts(self, path: Path, key: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored = SafeReader(path).read_metadata().state_dict_metadata
        kept: dict[str, Any] = {name: stored[f"{key}.{name}"] for name in parameters if f"{key}.{name}" in stored}
        own = {name: torch.empty_like(parameters[name], dtype=found.properties.dtype) for name, found in kept.items()}
        if own:
            read_into({key: own}, path)
        return own


class ReplicatedStrategy(DDPStrategy):
    """DDP: all weights on every rank, gradients averaged between them. `trainer.strategy: ddp` means this.

    Args:
        timeout_minutes: Minutes that ranks wait for one that is late, at the start as well; then they end. The first
            rank writes checkpoints, and may take that long for one.
        context_parallel: Number of ranks that share each sample, each with its part of the tokens, for pictures whose
            activations one device does not hold. It divides the number of ranks, the attention heads and the tokens.
    """

    def __init__(self, timeout_minutes: PositiveFloat = TIMEOUT_MINUTES, context_parallel: PositiveInt = 1) -> None:
        self.patience = timedelta(minutes=timeout_minutes)
        super().__init__(timeout=self.patience)
        self.context_parallel = context_parallel
        self.context: Context | None = None

    def setup_environment(self) -> None:
        """Connect the ranks."""
        super().setup_environment()
        self.context = new_context(self.context_parallel, self.world_size, self.root_device.type)
        wait(self.patience, *(self.context.groups if self.context else ()))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """The first rank writes; if it finds no room, all know."""
        path = Path(filepath)
        with full_for_all(path, partial_path(path)):
            super().save_checkpoint(checkpoint, filepath, storage_options)


def wait(timeout: timedelta, *groups: ProcessGroup) -> None:
    """Let the ranks of groups wait for each other no longer than this; those of a mesh have torch's own patience."""
    for group in groups:
        _set_pg_timeout(timeout, group)


@contextmanager
def full_for_all(path: Path, partial: Path) -> Iterator[None]:
    """Writing of which one rank may find no room: every rank raises FullDiskError then, and none waits for another."""
    failure = None
    try:
        with room_for(path, partial):
            yield
    except FullDiskError as error:
        failure = str(error)
    failures = [failure] * get_world_size()
    all_gather_object(failures, failure)
    if any(failures):
        raise FullDiskError(next(filter(None, failures)))


def _distributed_like(parameter: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
