"""`reward-bias`: shares that are known in closed form, a known bias found, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srpo_lightning.cli import main
from srpo_lightning.jobs.reward_bias import SHARE
from srpo_lightning.rewards import PictureStatistic, Reward

CLIP = str(Path(__file__).parents[2] / "srpo_lightning" / "assets" / "emoji-clip")
COUNT = 40


class Known(Reward):
    """Likes red whatever the text says, green or its lack by the prompt's number, and blue by the word before it.

    Args:
        alone: how much it likes red.
    """

    def __init__(self, alone: float = 1.0) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, images, texts):
        red, green, blue = images.mean((-2, -1)).unbind(1)
        parts = [text.rpartition(". ") for text in texts]
        sign = torch.tensor([1.0 - 2 * (int(prompt) % 2) for *_, prompt in parts])
        word = torch.tensor([{"": 0.0, "day": 1.0, "night": -1.0}[before] for before, *_ in parts])
        return self.alone * red + sign * green + word * blue


def write(folder: Path, prompts: list[str]) -> list[str]:
    """Noisy pictures of random colours, 8 x 8, with their prompts."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(len(prompts)):
        colour = torch.rand(3, generator=generator)
        pixels = (colour + 0.2 * torch.rand(8, 8, 3, generator=generator)).clamp(0, 1) * 255
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{number:02}.png")
    (folder.parent / "prompts.txt").write_text("\n".join(prompts))
    return ["--images", str(folder), "--prompts", str(folder.parent / "prompts.txt")]


def means(folder: Path) -> torch.Tensor:
    """Mean red, green and blue of every picture, [N, 3]."""
    pictures = [np.array(Image.open(path), dtype=np.float32) / 255 for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).mean((1, 2))


def run(arguments: list[str], tmp_path: Path) -> dict:
    main(["reward-bias", *arguments, "--output", str(tmp_path / "bias.json")])
    return json.loads((tmp_path / "bias.json").read_text())


@pytest.mark.parametrize("alone", [0.0, 1.0, 2.0])
def test_shares_are_those_that_the_reward_was_made_of(tmp_path, alone, capsys):
    """The gradient is (alone, +-1, word): of its square alone^2 / (alone^2 + 1) is common to all texts."""
    pictures = write(tmp_path / "pictures", [str(number) for number in range(COUNT)])
    reward = ["--reward", "tests.jobs.test_reward_bias.Known", "--reward.alone", str(alone)]
    found = run([*reward, *pictures, "--words", "day/night", "--others", "19"], tmp_path)
    expected = alone**2 / (alone**2 + 1)
    assert found["gradient"]["value"] == pytest.approx(expected, abs=0.04)
    red, green, _ = means(tmp_path / "pictures").unbind(1)
    of_score = alone**2 * red.var() / (alone**2 * red.var() + green.square().mean())  # the sign has mean 0
    assert found["score"]["low"] - 0.05 <= of_score <= found["score"]["high"] + 0.05
    assert found["subject"]["Relative, others"]["value"] == pytest.approx(1, abs=0.06)
    assert found["subject"]["Relative"]["value"] == pytest.approx(0, abs=0.06)  # the subject cancels
    if alone:
        assert found["common"]["Relative, others"]["value"] == pytest.approx(0, abs=0.1)
        assert found["common"]["Relative"]["value"] == pytest.approx(0, abs=0.1)
    advised = "train by Relative" in capsys.readouterr().out
    assert advised == (found["gradient"]["value"] > SHARE)
    assert found == run([*reward, *pictures, "--words", "day/night", "--others", "19"], tmp_path)


def test_a_bias_that_was_added_is_found_and_named(tmp_path):
    prompts = (Path(CLIP).parent / "prompts" / "eval.txt").read_text().split()[:16]
    pictures = write(tmp_path / "pictures", prompts)
    reward = ["--reward", "benchmarks.biased.SaturationBias", "--reward.pretrained", CLIP]
    found = [run([*reward, "--reward.weight", str(w), *pictures], tmp_path) for w in (0, 3, 20)]
    shares = [bias["gradient"]["value"] for bias in found]
    assert shares == sorted(shares)
    strongest = max(found[2]["direction"], key=lambda name: abs(found[2]["direction"][name]["value"]))
    assert strongest == "saturation"
    assert found[2]["direction"]["saturation"]["low"] > 0
    assert "more saturation first" in found[2]["advice"]


def test_what_cannot_be_measured_is_refused(tmp_path):
    pictures = write(tmp_path / "pictures", ["1", "2", "1"])
    known = ["--reward", "tests.jobs.test_reward_bias.Known"]
    with pytest.raises(SystemExit, match="2 different prompts: three is the least"):
        run([*known, *pictures], tmp_path)
    with pytest.raises(SystemExit, match="--words is 'day': write a positive and a negative word"):
        run([*known, *pictures, "--words", "day"], tmp_path)
    statistic = ["--reward", "PictureStatistic", "--reward.statistic", "saturation", "--reward.target", "0.2"]
    with pytest.raises(SystemExit, match="PictureStatistic reads no text"):
        run([*statistic, *pictures], tmp_path)


def test_a_statistic_near_its_target_is_rewarded():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward = PictureStatistic("brightness", 0.25)
    scores = reward(images, [""] * 4)
    (slope,) = torch.autograd.grad(scores.sum(), images)
    with torch.no_grad():
        assert (scores < 0).all()
        assert (reward(images + 1e-2 * slope.sign(), [""] * 4) > scores).all()
        assert reward(torch.full((1, 3, 8, 8), 0.25), [""]).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="statistic is 'grain': choose from saturation, brightness, high_frequency"):
        PictureStatistic("grain", 1.0)
