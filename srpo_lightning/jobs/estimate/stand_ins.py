"""What takes the memory of a compiled library's work on tensors that have no numbers to give to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim import Optimizer

STATE_BLOCK, NF4_BLOCK, STATISTICS_BLOCK = 256, 64, 256  # numbers per scale, of bitsandbytes
SMALLEST = 4096  # parameters of fewer numbers keep float32 states


class EightBitStates(Optimizer):
    """Two states of 8 bits with a float32 scale per block, as of bitsandbytes' and torchao's AdamW."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make the states where they are not there yet; the kernel needs no more."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    self.state[parameter] = {"first": _states(parameter), "second": _states(parameter)}


def _states(parameter: Tensor) -> list[Tensor]:
    size = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
    if parameter.numel() < SMALLEST:
        return [torch.empty(size)]
    return [torch.empty(size, dtype=torch.uint8), torch.empty(-(-size // STATE_BLOCK))]


class NF4Linear(nn.Linear):
    """A frozen layer in 4 bits that computes with its weight in full, made for each product and forgotten."""

    def __init__(self, layer: nn.Linear, double: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.compute_dtype = layer.weight.dtype
        self.bias = layer.bias
        size = layer.weight.numel()
        scales = size // NF4_BLOCK
        self.weight = nn.Parameter(torch.empty(size // 2, dtype=torch.uint8, device="meta"), requires_grad=False)
        dtype = torch.uint8 if double else torch.float32
        self.register_buffer("scales", torch.empty(scales, dtype=dtype, device="meta"))
        if double:
            self.register_buffer("scales_of_scales", torch.empty(-(-scales // STATISTICS_BLOCK), device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Computed in the dtype that the weight had."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product: Tensor = _Product.apply(x.to(self.compute_dtype), bias, (self.out_features, self.in_features))
        return product.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ upstream.new_empty(ctx.shape), None, None


def keep_in_4_bits(module: nn.Module, double: bool = False) -> None:
    """The stand-in of nf4.keep_in_4_bits."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(name, NF4Linear(layer, double))
