"""Rollouts at half the resolution, for configs/benchmark_speed.yaml: an experiment, not an option."""

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn import functional

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords, Rollout
from srpo_lightning.policies.base import Policy
from srpo_lightning.policies.flux import FluxPolicy, pack, unpack


class HalfSizeSRPO(SRPO):
    """SRPO whose rollouts have half the height and width; their latents are enlarged, and noised anew.

    Args:
        control_words: the positive and the negative words.
        num_rollout_steps: Euler steps of the rollout.
        margin: the hinge.
    """

    def __init__(self, control_words: ControlWords, num_rollout_steps: PositiveInt = 25, margin: float = 0.7) -> None:
        super().__init__(
            control_words,
            num_rollout_steps=num_rollout_steps,
            margin=margin,
            shared_noise=False,
            position_per_sample=True,
        )

    @torch.no_grad()
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """The rollout's own noise has no counterpart at the full size: as for real pictures, any serves."""
        if not isinstance(policy, FluxPolicy):  # where forward passes are counted there are no pictures
            return super().rollout(policy, conditions, draws)
        size = conditions.size or policy.size
        half = size[0] // 2, size[1] // 2
        small = super().rollout(policy, conditions._replace(size=half), draws).x0
        x0 = enlarged(small, half)
        noise = draws.noise(x0.shape, shared=self.shared_noise, purpose="full size").to(x0)
        return Rollout(x0, noise)


def enlarged(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Packed latents of a picture of `size` as those of one twice as high and wide."""
    return pack(functional.interpolate(unpack(latents, size), scale_factor=2, mode="bilinear"))
