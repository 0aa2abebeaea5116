"""AdamW by several libraries, and how far their updates are from each other."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def optimizer_classes() -> Mapping[str, Callable[[list[Tensor]], Optimizer]]:
    """AdamW by several libraries, with the official run's settings."""
    import bitsandbytes.optim
    import torchao.optim

    from srpo_lightning.training.low_bit import AdamW8bit

    settings: dict[str, Any] = {"lr": 5e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    rounding = settings | {"bf16_stochastic_round": True}
    return {
        "torch.optim.AdamW": partial(torch.optim.AdamW, **settings),
        "torch.optim.AdamW, fused": partial(torch.optim.AdamW, fused=True, **settings),
        "bitsandbytes.optim.AdamW8bit": partial(bitsandbytes.optim.AdamW8bit, **settings),
        "torchao.optim.AdamW8bit": partial(torchao.optim.AdamW8bit, **rounding),
        "srpo_lightning.training.low_bit.AdamW8bit": partial(AdamW8bit, **rounding),
    }


def distance(updates: list[Tensor], reference: list[Tensor]) -> float:
    """The norm of the difference over the norm of the reference."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(updates, reference, strict=True))
    return (difference / sum(float(b.square().sum()) for b in reference)) ** 0.5
