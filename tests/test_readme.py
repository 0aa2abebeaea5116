"""The README's examples of a reward, an objective and a policy of one's own are code that runs."""

import textwrap
from pathlib import Path

import pytest
import torch

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.rewards import Reward
from tests import tiny

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example(first_line: str, last_line: str, name: str, most_lines: int = 30) -> type:
    """A class of an indented block of the README, which lies between two lines."""
    block = README[README.index(first_line) : README.index(last_line)]
    assert len(block.strip().splitlines()) <= most_lines
    namespace: dict = {}
    exec(compile(textwrap.dedent(block), "README.md", "exec"), namespace)
    return namespace[name]


class Warmth(Reward):
    """Red less blue."""

    def forward(self, images, texts):
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def test_the_reward_example_prefers_the_named_colour_and_sends_gradient_to_the_pixels():
    reward = example("    # my_rewards.py", "    # my.yaml", "NamedColour", most_lines=20)()
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2] = 1, 1
    images.requires_grad_()
    scores = reward(images, ["red. a cat", "red. a cat"])
    assert scores[0] > scores[1]
    relative = reward.contrast(images, [["red. a"] * 2, ["blue. a"] * 2], torch.tensor([[1.0, -1.0]] * 2))
    (gradient,) = torch.autograd.grad(relative.sum(), images)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 2] < 0).all()


def rewards_while_training(policy, objective, conditions: Conditions, num_steps: int) -> list[float]:
    """The mean score of the same samples before and after some steps."""
    module = SRPOModule(policy, Warmth(), objective, num_sample_steps=20)
    module.configure_model()
    optimizer = torch.optim.Adam([p for _, p in module.trainable_parameters()], lr=1e-2)
    found = []
    for steps in (0, num_steps):
        for step in range(steps):
            draws = Draws(0, step)
            rollout = objective.rollout(policy, conditions, draws)
            optimizer.zero_grad()
            objective.loss(policy, module.reward, conditions, rollout, draws).loss.backward()
            optimizer.step()
        images = module.sample(conditions)
        found.append(float(objective.score(module.reward, images, conditions.prompts).mean()))
    return found


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return example("    # my_policies.py", "## The built-in model", "PixelFlow")()


def test_the_objective_example_trains_the_policy_example_towards_its_reward(pixels):
    objective = example("    # my_objectives.py", "    # my_policies.py", "LateReward")()
    before, after = rewards_while_training(pixels, objective, tiny.new_conditions(4), 10)
    assert after > before + 0.1


def test_the_policy_example_samples_trains_with_srpo_and_starts_anew(pixels):
    class Named(Warmth):
        def forward(self, images, texts):
            return super().forward(images, texts) * torch.tensor([1.0 if "red" in text else -1.0 for text in texts])

    objective = SRPO(ControlWords(["red"], ["blue"]), num_rollout_steps=4, margin=5.0)
    module = SRPOModule(pixels, Named(), objective, num_sample_steps=2)
    module.configure_model()
    conditions, draws = tiny.new_conditions(2), Draws(0)
    assert module.sample(conditions).shape == (2, 3, 8, 8)
    first = [p.detach().clone() for _, p in module.trainable_parameters()]
    rollout = objective.rollout(pixels, conditions, draws)
    objective.loss(pixels, module.reward, conditions, rollout, draws).loss.backward()
    with torch.no_grad():
        for _, parameter in module.trainable_parameters():
            assert parameter.grad.abs().sum() > 0
            parameter -= parameter.grad
    pixels.restart()
    assert all(torch.equal(p, own) for (_, p), own in zip(module.trainable_parameters(), first, strict=True))
