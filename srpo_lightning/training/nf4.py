"""Frozen linear layers in 4 bits (NF4, arXiv 2305.14314) or 8 (arXiv 2208.07339), by bitsandbytes, on the CPU too."""

import importlib
from collections.abc import Container, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


def check_bitsandbytes() -> None:
    """Refuse early what could not be loaded.

    Raises:
        ValueError: with the command that installs the missing package.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes: pip install 'srpo-lightning[quant]'")


def rounding_device() -> torch.device:
    """Where weights are rounded: on a GPU in a moment, on two cores FLUX.1 in minutes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_in_4_bits(module: nn.Module, double: bool = False, but: Container[str] = ()) -> None:
    """Turn the linear layers in a module into NF4, where they are; gradients pass through them to their inputs.

    A weight takes 4.5 bits: 4, and a float32 scale per block of 64. Products are computed in the dtype that the weights
    had.

    Args:
        double: Whether to round the scales to 8 bits too: 4.13 bits per weight.
        but: Names of layers that stay as they are.
    """
    bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in but:
            small = _without_memory(layer)
            weight = bitsandbytes.Params4bit(
                layer.weight.data, quant_type="nf4", compress_statistics=double, module=small
            )
            small.weight, small.bias = weight.to(rounding_device()).to(layer.weight.device), layer.bias
            module.set_submodule(name, small)


@torch.no_grad()
def restore_in_4_bits(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module without memory the state that it had after `keep_in_4_bits`, on the CPU."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")
    whole = dict(state)
    for name, layer in list(module.named_modules()):
        prefix = f"{name}.weight."
        own = {key.removeprefix(prefix): whole.pop(key) for key in state if key.startswith(prefix)}
        if own:
            small = _without_memory(layer)
            small.weight = bitsandbytes.Params4bit.from_prequantized(
                whole.pop(f"{name}.weight"), own, device="cpu", module=small
            )
            small.bias = layer.bias
            module.set_submodule(name, small)
    module.load_state_dict(whole, strict=False, assign=True)
    module.requires_grad_(False)


def _without_memory(layer: nn.Linear) -> Any:
    bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")
    small = bitsandbytes.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    small.support_avx512bf16_for_cpu = False  # a fast path that repacks the weights and has no gradient
    return small


def keep_in_8_bits(module: nn.Module, device: torch.device | str) -> None:
    """Turn the linear layers in a module into LLM.int8() on a device: 8 bits per weight, a scale per row.

    Where they are to compute: what bitsandbytes 0.50 computes with stays behind when a module is moved later.
    """
    bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            small = bitsandbytes.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, device="meta"
            )
            weight = bitsandbytes.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            small.weight, small.bias = weight, layer.bias
            module.set_submodule(name, small.to(device))
