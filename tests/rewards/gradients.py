"""A reward's gradient against central differences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from srpo_lightning.rewards import Reward


def assert_gradient_equals_differences(reward: Reward, pixels: Tensor, texts: Sequence[str], least: float) -> Tensor:
    """In float64, along one direction for each image, whose slope is `least` at least; returns the gradient."""
    assert pixels.dtype == torch.float64
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = reward(pixels, texts)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert scores.dtype == torch.float64
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (reward(pixels + sign * step * direction, texts) for sign in (1, -1))
    slopes = (gradient * direction).sum((1, 2, 3))
    assert slopes.abs().min() > least
    torch.testing.assert_close(slopes, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)
    return gradient
