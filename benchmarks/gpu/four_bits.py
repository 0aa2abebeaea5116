"""Layers in 4 bits: whether their gradient is right, and what they cost beside bfloat16 ones."""

import importlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bare_step import synchronize
from benchmarks.gpu.passes import seconds_of, times_of_passes
from benchmarks.gpu.recipes import new_conditions, new_module, settings_of
from benchmarks.gpu.scale import Scale, free_cached, memory_of
from benchmarks.optimizers import distance
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.training.nf4 import keep_in_4_bits

LAYERS = ((3072, 3072), (3072, 12288), (12288, 3072))
"""Inputs and outputs of FLUX.1-dev's projections and MLPs."""

TOKENS = 2 * 2537
"""Of two samples at 720 x 720 with 512 text tokens."""

TOLERANCE = 0.02
"""Of a product and its gradient, from those of the same weights written out in bfloat16: the rounding of sums."""


def written_out(layer: Any) -> Tensor:
    """The weight [out, in] that a layer in 4 bits stands for."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    weight: Tensor = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def forward_and_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """A product, and its gradient in the input."""
    leaf = x.detach().requires_grad_()
    y: Tensor = layer(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    return y.detach(), gradient


def layer(inputs: int, outputs: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """A linear layer in both forms."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    holder = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16))
    holder.load_state_dict({"0.weight": plain.weight})
    holder.requires_grad_(False)
    synchronize(device)
    start = time.perf_counter()
    keep_in_4_bits(holder)
    synchronize(device)
    rounding = time.perf_counter() - start
    small = holder[0]
    x, upstream = (torch.randn(tokens, n, device=device, dtype=torch.bfloat16) for n in (inputs, outputs))
    rounded = distance([written_out(small).float()], [plain.weight.float()])
    plain.weight.data = written_out(small).to(plain.weight.dtype)
    pairs = zip(forward_and_backward(small, x, upstream), forward_and_backward(plain, x, upstream), strict=True)
    apart = [distance([own.float()], [expected.float()]) for own, expected in pairs]
    return {
        "seconds to round": rounding,
        "rounding error": rounded,
        "product": apart[0],
        "gradient": apart[1],
        "seconds, bfloat16": seconds_of(lambda: forward_and_backward(plain, x, upstream), device),
        "seconds, 4 bits": seconds_of(lambda: forward_and_backward(small, x, upstream), device),
        "passed": all(found <= TOLERANCE for found in apart),
    }


def four_bits(scale: Scale) -> dict[str, Any]:
    """Single layers, and whole passes of the QLoRA recipe in 4 bits and in bfloat16."""
    device = scale.torch_device
    shapes = ((64, 96),) if scale.is_small else LAYERS
    layers = {f"{a} to {b}": layer(a, b, 16 if scale.is_small else TOKENS, device) for a, b in shapes}
    memory = memory_of(device)
    passes = {}
    for quantize in ("none", "nf4"):
        with settings_of("QLoRA", scale, {f"{POLICY}.quantize": quantize}) as config:
            module = new_module(config, scale)
            with memory.counting(module):
                passes[quantize] = times_of_passes(module, new_conditions(module, config), memory, 3)
            del module
            free_cached(device)
    return {"layers": layers, "passes": passes, "passed": all(own["passed"] for own in layers.values())}
