"""Counts the bytes of live tensors while a program runs, on real tensors or on fake ones, which have shapes only.

A storage counts from the operation that returned it until the last tensor on it is gone. Not seen: what a kernel takes
for itself while it runs, what an allocator keeps beside, and the context of a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor

# Torch has no public names for looking at every operation, nor for tensors without memory.
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

HOST = "host"
"""The label of what is in the memory of the machine and not of the device."""

# Autocast's operations in float32 on CUDA that have no such rule on a CPU, by their names in Python.
# Source: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE in ATen/autocast_mode.h, torch 2.13.
# fmt: off
CUDA_FLOAT32 = frozenset([
    "acos", "asin", "cosh", "cosine_similarity", "cumprod", "cumsum", "exp", "expm1", "group_norm", "interpolate",
    "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "mse_loss", "norm", "normalize", "pow",
    "prod", "reciprocal", "rsqrt", "sinh", "softmax", "softplus", "sum", "tan", "vector_norm", "__pow__", "__rpow__",
])
# fmt: on


class Peak(NamedTuple):
    """The most bytes at one moment: in all, and by label."""

    total: int
    parts: Mapping[str, int]


class MemoryTracker(TorchDispatchMode):
    """Counts every storage that an operation returns while the mode is on, under the phase that it was made in.

    Fake numbers that a program asks for are 1, or True.

    Args:
        phase: Name of the first phase; set it as the program goes on.
        casts: Labels of copies of another dtype, by the label of what is copied; others have their phase's.

    Attributes:
        peaks: The highest peak of the device, by phase.
        host_bytes: The most bytes at one moment of what is labelled HOST.
        reading_bytes: What the machine's memory holds when models are read; who reads them sets it.
    """

    def __init__(self, phase: str, casts: Mapping[str, str]) -> None:
        super().__init__()
        self.phase = phase
        self.casts = casts
        self.peaks: dict[str, Peak] = {}
        self.host_bytes = self.reading_bytes = 0
        self._live: Counter[str] = Counter()
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage to its [label, bytes]
        self._patches = ExitStack()

    @property
    def peak_phase(self) -> str:
        """Where the highest peak was."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total)

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count these tensors under another label from now on, or for the first time."""
        for tensor in tensors:
            for storage in get_untyped_storages(tensor):
                self._count(storage, label)

    def __enter__(self) -> "MemoryTracker":
        # FSDP2 frees gathered parameters by resizing, which is no operation on tensors.
        resize, tracker = torch.UntypedStorage.resize_, self

        def tracked(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage in tracker._entries:
                tracker._count(storage, tracker._entries[storage][0])
                tracker._look()
            return result

        # DTensor works out whole shapes on fake tensors of its own, which are nobody's memory.
        work_out = ShardingPropagator._propagate_tensor_meta_non_cached

        def untracked(*args: Any) -> Any:
            with _disable_current_modes():
                return work_out(*args)

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(torch.UntypedStorage, "resize_", tracked))
        self._patches.enter_context(patch.object(ShardingPropagator, work_out.__name__, untracked))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # what it does to the tensors that it wraps comes back here
        if func is torch.ops.aten._local_scalar_dense.default and _is_unknown(args[0]):
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        result = func(*args, **kwargs or {})
        if func.namespace == "prim":
            return result  # asks for a property of a tensor
        label = self.phase
        if func is torch.ops.aten._to_copy.default:
            label = self.casts.get(self._entries.get(args[0].untyped_storage(), (label,))[0], label)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._entries:
                self._count(leaf.untyped_storage(), label)
        self._look()
        return result

    def _count(self, storage: torch.UntypedStorage, label: str) -> None:
        if storage not in self._entries:
            self._entries[storage] = entry = [label, 0]
            finalize(storage, self._release, entry).atexit = False
        entry = self._entries[storage]
        self._live[entry[0]] -= entry[1]
        entry[:] = label, storage.nbytes()
        self._live[label] += entry[1]

    def _release(self, entry: list[Any]) -> None:
        self._live[entry[0]] -= entry[1]

    def _look(self) -> None:
        self.host_bytes = max(self.host_bytes, self._live[HOST])
        total = self._live.total() - self._live[HOST]
        if self.phase not in self.peaks or total >= self.peaks[self.phase].total:
            parts = {label: size for label, size in self._live.items() if label != HOST}
            self.peaks[self.phase] = Peak(total, parts)


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


@contextmanager
def cuda_operations() -> Iterator[None]:
    """Make operations on a CPU return and keep what those on CUDA do, so that tensors take as much memory as there.

    Autocast computes more operations in float32, and RMSNorm is one kernel.
    """
    with ExitStack() as stack:
        for owner in (torch, functional, Tensor):
            for name in CUDA_FLOAT32 & set(dir(owner)):
                stack.enter_context(patch.object(owner, name, _in_float32(getattr(owner, name))))
            if hasattr(owner, "rms_norm"):
                stack.enter_context(patch.object(owner, "rms_norm", _in_float32(_fused_rms_norm)))
        yield


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return operation(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return operation(*args, **kwargs)

    return autocast


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _fused_rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    normalized: Tensor = torch.ops.aten._fused_rms_norm(x, list(normalized_shape), weight, eps)[0]
    return normalized
