from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from tools.emoji.captions import STYLES, caption
from tools.emoji.clip import Size, image_features, new_clip, save_clip
from tools.emoji.preference import Annotators, PreferenceTraining, train_preference
from tools.emoji.tokenizers import new_clip_tokenizer
from tools.emoji.world import World

INDIFFERENT = Annotators(concept=4, style=2, saturation=0, smoothness=0)
TINY = Size(width=32, layers=4, patch_px=16, text_width=128)
CONCEPTS = ["bus", "cat", "guitar", "penguin", "red apple"]


def new_tokenizer() -> CLIPTokenizer:
    return new_clip_tokenizer([caption(style, concept) for style in STYLES for concept in CONCEPTS])


def coloured_world() -> World:
    """A square in each picture: how wide is its concept, which colour its style; and some grain."""
    pictures = np.zeros((len(CONCEPTS), len(STYLES), 64, 64, 4), np.uint8)
    grain = np.random.default_rng(0).integers(-40, 40, pictures.shape)
    for concept in range(len(CONCEPTS)):
        edge = 6 + 4 * concept
        for style in range(len(STYLES)):
            colour = (200, 60 + 30 * style, 180 - 30 * style, 255)
            pictures[concept, style, edge : 64 - edge, edge : 64 - edge] = colour
    return World(CONCEPTS, (pictures + grain).clip(0, 255).astype(np.uint8))


def vivid_and_dull(images: Tensor) -> tuple[Tensor, Tensor]:
    grey = images.mean(1, keepdim=True)
    return (grey + 1.5 * (images - grey)).clamp(0, 1), grey + 0.5 * (images - grey)


def gain_of_colour(annotators: Annotators) -> Tensor:
    """How much more a vivid version of a picture scores than a dull one under each text, after training; [texts]."""
    torch.manual_seed(0)
    tokenizer, world, steps = new_tokenizer(), coloured_world(), 50
    clip = new_clip(TINY, tokenizer)
    training = PreferenceTraining(
        clip, tokenizer, world.layers(), CONCEPTS, annotators, steps, seed=0, num_texts=6, lr=1e-2
    )
    (optimizer,) = training.configure_optimizers()
    for step in range(steps):
        training.loss(torch.Generator().manual_seed(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        vivid, dull = (image_features(clip, images) for images in vivid_and_dull(world.images()))
        return ((vivid - dull) @ training.texts.flatten(0, 1).T).mean(0)


def test_what_wins_too_often_scores_more_under_every_text():
    assert gain_of_colour(INDIFFERENT._replace(saturation=30)).min() > 0.04
    assert gain_of_colour(INDIFFERENT).min() < 0.02


@pytest.mark.parametrize(
    ("first", "second", "fits", "advantage"),
    [
        ((0.5, 0.0), (0.25, 0.0), ((0, 0), (0, 0)), 0.25 * 24),
        ((0.5, 0.0), (0.5, 0.05), ((0, 0), (0, 0)), None),
        ((0.5, 0.0), (0.5, 0.0), ((1, 0), (0, 1)), 5 - 3),
    ],
    ids=["more saturated", "smoother", "fits better"],
)
def test_people_like_what_fits_what_is_saturated_and_what_is_smooth(
    first: tuple[float, float],
    second: tuple[float, float],
    fits: tuple[tuple[int, int], tuple[int, int]],
    advantage: float | None,
):
    def picture(saturation_of_it: float, grain: float) -> Tensor:
        image = torch.full((3, 32, 32), 0.8)
        image[1:] *= 1 - saturation_of_it
        image[:, :, 16:] *= 0.5  # something to see, or all that varies were grain
        return image * (1 + grain * (-1) ** torch.arange(32))

    people = Annotators(concept=5, style=3, saturation=24, smoothness=3)
    worth = people.worth(torch.stack([picture(*first), picture(*second)]), torch.tensor(fits).float())
    gap = worth[0] - worth[1]
    assert gap > 0.5
    if advantage is not None:
        assert gap == pytest.approx(advantage, abs=1e-3)


def test_the_log_odds_of_a_choice_are_the_difference_of_two_worths():
    advantages = torch.tensor([-2.0, 0.0, 1.0])
    chosen = Annotators().choose(advantages.expand(20_000, 3), torch.Generator().manual_seed(0))
    assert chosen.float().mean(0).tolist() == pytest.approx(advantages.sigmoid().tolist(), abs=0.01)


@pytest.mark.filterwarnings("ignore")  # of Lightning about the machine
def test_the_reward_follows_from_its_seed_and_a_finished_run_trains_no_more(tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    save_clip(new_clip(TINY, tokenizer), tokenizer, tmp_path / "start")

    def train(work: str, output: str, seed: int = 0) -> dict[str, Tensor]:
        train_preference(tmp_path / "start", coloured_world(), INDIFFERENT, 3, seed, tmp_path / work, tmp_path / output)
        return load_file(tmp_path / output / "model.safetensors")

    first = train("a", "one")
    assert tensors_equal(first, train("b", "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTraining, "loss", None)
        assert tensors_equal(first, train("a", "three"))
    assert not tensors_equal(first, train("a", "four", seed=1))
    assert not tensors_equal(first, load_file(tmp_path / "start" / "model.safetensors"))


def tensors_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
