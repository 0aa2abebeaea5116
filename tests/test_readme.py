"""The README's example of a reward of one's own is code that runs."""

import textwrap
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_reward_example_prefers_the_named_colour_and_sends_gradient_to_the_pixels():
    block = README[README.index("    # my_rewards.py") : README.index("    # my.yaml")]
    assert len(block.strip().splitlines()) <= 20
    namespace: dict = {}
    exec(compile(textwrap.dedent(block), "README.md", "exec"), namespace)
    reward = namespace["NamedColour"]()
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2] = 1, 1
    images.requires_grad_()
    scores = reward(images, ["red. a cat", "red. a cat"])
    assert scores[0] > scores[1]
    relative = reward.contrast(images, [["red. a"] * 2, ["blue. a"] * 2], torch.tensor([[1.0, -1.0]] * 2))
    (gradient,) = torch.autograd.grad(relative.sum(), images)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 2] < 0).all()
