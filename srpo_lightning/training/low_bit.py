"""Optimizer states in eight bits, for parameters that are divided over ranks too."""

import torch
import torchao.optim
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's AdamW8bit, for bfloat16 parameters under ShardedStrategy too.

    The states of torchao 0.18 pass for tensors of the parameter's dtype, which sharding forgets, so that the first step
    on sharded bfloat16 ends in "expected dtype" (github.com/pytorch/ao/issues/3314). Here they pass for float32, which
    they are computed in.
    """

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> OptimState8bit:
        return OptimState8bit.zeros(p.shape, signed, block_size, p.device, dtype=torch.float32)
