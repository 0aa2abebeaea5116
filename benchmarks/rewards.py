"""One reward step at full size, ViT-H-14 with random weights: image encoded once for both words, against two calls.

python benchmarks/rewards.py [--batch_size 4] [--repeats 3] [--precision 32]

Three ways, interleaved, forward and backward to the pixels, in bfloat16 under autocast or in float32:
  shared    the images through the vision tower once, text features from the cache: what training does
  separate  two calls of the reward, text features from the cache
  uncached  two calls, and text features computed anew in each, as the research code does
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from srpo_lightning.rewards import ClipReward

VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
}
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}


class RandomViTH(ClipReward):
    """HPSv2's architecture; the tokenizer is the built-in model's."""

    def read_model(self) -> CLIPModel:
        """Random weights."""
        config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=1024)
        return CLIPModel(config)


def main(batch_size: int = 4, repeats: int = 3, size: int = 720, precision: Literal["bf16", "32"] = "bf16") -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_mixed = precision == "bf16"
    reward = RandomViTH("srpo_lightning/assets/emoji-clip", dtype="bfloat16" if is_mixed else "float32")
    reward.load()
    reward.preprocess = reward.preprocess._replace(size=(224, 224))
    reward.to(device)
    images = torch.rand(batch_size, 3, size, size, device=device)
    prompts = [f"a photograph of cat number {i} on a table in the evening light" for i in range(batch_size)]
    positive, negative = ([f"{word}. {prompt}" for prompt in prompts] for word in ("Real", "Painting"))
    coefficients = torch.tensor([[1.1, -1.0]] * batch_size, device=device)

    def shared(pixels: Tensor) -> Tensor:
        return reward.contrast(pixels, [positive, negative], coefficients)

    def separate(pixels: Tensor) -> Tensor:
        return coefficients[:, 0] * reward(pixels, positive) + coefficients[:, 1] * reward(pixels, negative)

    def uncached(pixels: Tensor) -> Tensor:
        reward._text_features.clear()
        return separate(pixels)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"shared": shared, "separate": separate, "uncached": uncached}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients = {}
    for turn in range(repeats + 1):  # the first one warms up
        for name, way in ways.items():
            pixels = images.clone().requires_grad_()
            synchronize(device)
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
                values = way(pixels)
            values.sum().backward()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            gradients[name] = pixels.grad
    assert gradients["shared"] is not None
    for name, times in seconds.items():
        ratio = median(times) / median(seconds["shared"])
        difference = (gradients[name] - gradients["shared"]).norm() / gradients["shared"].norm()
        print(f"{name:9} {median(times):8.3f} s   {ratio:5.2f} x shared   gradient differs by {difference:.1e}")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    auto_cli(main)
