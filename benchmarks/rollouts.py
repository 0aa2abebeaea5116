"""What makes a rollout faster, in seconds; what that costs in quality, experiments/objectives/speed.yaml measures.

python -m benchmarks.rollouts [--repeats 5]

Rollouts at half the resolution are an experiment, not an option.
"""

import time
from functools import partial
from statistics import median

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn import functional

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.draws import Draws
from srpo_lightning.encoding import Encoding
from srpo_lightning.objectives import SRPO, ControlWords, Rollout
from srpo_lightning.policies.base import Policy
from srpo_lightning.policies.flux import FluxPolicy
from srpo_lightning.policies.packing import pack, unpack


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


WAYS: dict[str, tuple[int, float | None, bool]] = {
    "25 steps": (25, None, False),
    "12 steps": (12, None, False),
    "6 steps": (6, None, False),
    "3 steps": (3, None, False),
    "25 steps, feature cache 0.1": (25, 0.1, False),
    "25 steps, feature cache 0.2": (25, 0.2, False),
    "25 steps at half size": (25, None, True),
}
"""Steps, threshold of the feature cache, and whether at half size."""


def main(repeats: PositiveInt = 5, batch_size: PositiveInt = 16) -> None:
    """Print seconds of a rollout of the built-in model, and how far it ends from where 25 steps do; ways take turns.

    Args:
        repeats: turns.
        batch_size: prompts.
    """
    pretrained, words = "srpo_lightning/assets/emoji-flux", ControlWords(["3d"], ["flat"])
    policy = FluxPolicy(pretrained, 64, 64)
    policy.load()
    prompts = read_prompts("srpo_lightning/assets/prompts/train.txt").prompts[:batch_size]
    text = Text.collate(policy.encoder(Encoding()).text.encode(prompts))
    conditions = Conditions(prompts, text, torch.arange(batch_size), policy.size)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    ends: dict[str, Tensor] = {}
    for _ in range(repeats + 1):
        for name, (num_steps, policy.rollout_cache, is_half) in WAYS.items():
            kind = HalfSizeSRPO if is_half else partial(SRPO, shared_noise=False)
            start = time.perf_counter()
            with policy.rolling_out():
                ends[name] = kind(words, num_rollout_steps=num_steps).rollout(policy, conditions, Draws(0)).x0
            seconds[name].append(time.perf_counter() - start)
    full, whole = ends["25 steps"], median(seconds["25 steps"][1:])
    print("| rollout | seconds | of 25 steps | distance of its end from theirs |\n|---|---|---|---|")
    for name, taken in seconds.items():
        distance = float((ends[name] - full).norm() / full.norm())
        print(f"| {name} | {median(taken[1:]):.2f} | {median(taken[1:]) / whole:.2f} | {distance:.3f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
