"""The arithmetic of rectified flow, on tensors alone (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206).

Convention, the one FLUX uses: `sigma` is the noise level in [0, 1] (1 = pure noise),

    x = (1 - sigma) x0 + sigma noise,        velocity = dx / dsigma = noise - x0.

Other libraries run time the other way and flip the sign of the velocity. A schedule is descending. Every function works
in the dtype of its arguments (float64 in, float64 out). It broadcasts sigma over the axes after the first.

Shapes: B samples, `*rest` the axes of one sample, N noise levels.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "B *rest"]
Sigma: TypeAlias = Float[Tensor, " B"]
Sigmas: TypeAlias = Float[Tensor, " N"]


def shift_sigma(sigma: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Move a uniform noise level towards more noise: `shift sigma / (1 + (shift - 1) sigma)`.

    Args:
        sigma: Noise levels in [0, 1]; 0 and 1 stay where they are.
        shift: Factor above 0; 1 changes nothing, SRPO trains FLUX with 3.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2 (timestep shifting).
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(num_steps: int, shift: float, dtype: torch.dtype = torch.float64) -> Sigmas:
    """The `num_steps + 1` noise levels of an Euler sampler, from 1 down to 0.

    They are those of diffusers' FlowMatchEulerDiscreteScheduler when FluxPipeline calls it with as many steps.
    """
    return shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=dtype), shift)


def inject(x0: Latents, noise: Latents, sigma: Sigma) -> Latents:
    """Noise clean latents to level `sigma`: `(1 - sigma) x0 + sigma noise`."""
    sigma = _per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def step(x: Latents, velocity: Latents, sigma: Sigma, sigma_next: Sigma) -> Latents:
    """One Euler step from level `sigma` to `sigma_next`, in either direction: `x + (sigma_next - sigma) v`."""
    return x + _per_sample(sigma_next - sigma, x) * velocity


def recover(x: Latents, noise: Latents, sigma: Sigma) -> Latents:
    """Undo `inject`: the clean latents that a known `noise` hides in `x`, `(x - sigma noise) / (1 - sigma)`.

    Args:
        x: Latents at level `sigma`.
        noise: Noise that was injected, the very same.
        sigma: Noise levels in [0, 1); at 1 nothing is left to recover.

    Source: Direct-Align, arXiv 2509.06942.
    """
    sigma = _per_sample(sigma, x)
    return (x - sigma * noise) / (1 - sigma)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Latents, sigmas: Sigmas) -> Latents:
    """Follow the flow through a schedule with Euler steps.

    Args:
        velocity: Model, called with latents and one noise level per sample ([B], in the dtype of `x`).
        x: Latents at level `sigmas[0]`.
        sigmas: Noise levels, N + 1 of them, in float64 so that their differences are exact to the dtype of `x`.
    """
    levels = sigmas.to(x, non_blocking=True).unsqueeze(1).expand(-1, len(x))
    for sigma, sigma_next in pairwise(levels):
        x = step(x, velocity(x, sigma), sigma, sigma_next)
    return x


def score(x: Latents, velocity: Latents, sigma: Sigma) -> Latents:
    """The score, the gradient of the log-density that a velocity implies: `-(x + (1 - sigma) v) / sigma`, sigma > 0.

    It is `-(x - (1 - sigma) x0_hat) / sigma^2` with `x0_hat = x - sigma v`.
    """
    sigma = _per_sample(sigma, x)
    return -(x + (1 - sigma) * velocity) / sigma


def random_step(
    x: Latents, velocity: Latents, sigma: Sigma, sigma_next: Sigma, diffusion: Sigma
) -> tuple[Latents, Tensor]:
    """One Euler-Maruyama step down of the SDE that has the same marginals as the flow.

    Args:
        diffusion: Noise g per root of a unit of sigma; 0 makes the step that of `step`.

    Returns:
        Mean and standard deviation of the normal distribution of the next latents. The mean is
        `x + (v - g^2 score / 2) (sigma_next - sigma)`. The deviation `g sqrt(sigma - sigma_next)` broadcasts over it.

    Source: DanceGRPO, arXiv 2505.07818, with g = eta; Flow-GRPO, arXiv 2505.05470, with
    g = a sqrt(sigma / (1 - sigma)).
    """
    drift = velocity - _per_sample(diffusion, x) ** 2 / 2 * score(x, velocity, sigma)
    std = _per_sample(diffusion * (sigma - sigma_next).sqrt(), x)
    return step(x, drift, sigma, sigma_next), std


def log_prob(x: Latents, mean: Latents, std: Tensor) -> Float[Tensor, " B"]:
    """The logarithm of the normal density of each sample, averaged over its elements, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mean, std = x.to(dtype), mean.to(dtype), std.to(dtype)
    density = -(((x - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def normal_kl(mean: Latents, reference: Latents, std: Tensor) -> Float[Tensor, " B"]:
    """The KL divergence of two normal distributions with one `std`, averaged over elements, in float32 at least."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return (((mean.to(dtype) - reference.to(dtype)) / std.to(dtype)) ** 2 / 2).flatten(1).mean(1)


def _per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
