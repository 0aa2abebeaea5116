"""VideoAlign against transformers 4.45.2, which its repository names: processor, Qwen2-VL and gradient, random weights.

The repository is no package. Its own code was run once beside ours, as docs/rewards.md says.
"""

import pytest
import torch

from srpo_lightning.rewards import VideoAlignReward, qwen2_vl
from srpo_lightning.rewards.pixels import CLIP_STD
from srpo_lightning.rewards.video_align import INSTRUCTION, REWARD_TOKENS
from tests.parity import originals
from tests.parity.test_hpsv3 import AWKWARD
from tests.rewards.qwen import write_base, write_video_reward

AS_THEY_ARE = [(4, 280, 392), (2, 448, 448)]  # frames, height, width; nothing is resized
RESIZED = [(4, 480, 832), (6, 64, 64), (2, 720, 400)]
TEXTS = [text for text in AWKWARD if "<|video_pad|>" not in text and len(text) < 1000]  # the processor fails at the one


def of_size(frames: int, height: int, width: int, draw: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (frames, 3, height, width), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video_align")
    (folder / "qwen").mkdir()
    write_video_reward(write_base(folder / "qwen"), folder / "reward")
    reward = VideoAlignReward(str(folder / "qwen"), str(folder / "reward"), dtype="float32")
    reward.load()
    return reward


@pytest.fixture(scope="module")
def original(reward, tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    clips = [of_size(*size, draw) for size in AS_THEY_ARE + RESIZED]
    texts = ["a cat that jumps", "Painting. a horse {4k}", "", "a red apple, spinning", "very " * 40]
    inputs = {
        "base": reward.pretrained,
        "state": reward.network.state_dict(),
        "special": list(REWARD_TOKENS),
        "clips": clips,
        "words": [INSTRUCTION.format(text_prompt=text) for text in texts],
        "awkward": [INSTRUCTION.format(text_prompt=text) for text in TEXTS],
        "max_pixels": 200704,
    }
    outputs = originals.run("clips", tmp_path_factory.mktemp("original"), packages="hpsv3", **inputs)
    return outputs | {"clips": clips, "texts": texts}


def as_batch(clip: torch.Tensor) -> torch.Tensor:
    return clip.transpose(0, 1)[None] / 255


@pytest.fixture
def seen(monkeypatch):
    """Patches that the vision tower got."""
    patches = []

    def to_patches(*args, to_patches=qwen2_vl.to_patches):
        patches.append(to_patches(*args))
        return patches[-1]

    monkeypatch.setattr(qwen2_vl, "to_patches", to_patches)
    return patches


def heads(reward, ratings):
    """What the head said, before the authors' units."""
    units = reward.settings["inference_config"]
    mean, std = (torch.tensor([units[f"{own}_{kind}"] for own in ("VQ", "MQ", "TA")]) for kind in ("mean", "std"))
    return ratings * std + mean


def test_tokens_and_grids_equal_the_processors(original, reward):
    for clip, text, tokens, grid in zip(*(original[own] for own in ("clips", "texts", "tokens", "grid")), strict=True):
        assert reward.tokenize(text, int(grid.prod()) // 4) == tokens.tolist(), text
        with torch.no_grad():
            assert reward.clip_features(as_batch(clip)).shape[1] == grid.prod() // 4
    for text, tokens in zip(TEXTS, original["awkward"], strict=True):
        assert reward.tokenize(text, int(original["grid"][0].prod()) // 4) == tokens.tolist(), text


def test_patches_equal_the_processors_up_to_rounding_to_8_bits(original, reward, seen):
    with torch.no_grad():
        for clip in original["clips"]:
            reward.clip_features(as_batch(clip))
    channel_std = torch.tensor(CLIP_STD).repeat_interleave(2 * 14 * 14)
    for i, (ours, theirs) in enumerate(zip(seen, original["pixels"], strict=True)):
        difference = (ours - theirs).abs() * channel_std
        assert difference.max() < (1e-6 if i < len(AS_THEY_ARE) else 0.501 / 255)


def test_ratings_equal_the_models_at_equal_pixels(original, reward, monkeypatch):
    """Of resized clips at the original's resized pixels, which are rounded to 8 bits."""
    for i, (clip, text) in enumerate(zip(original["clips"], original["texts"], strict=True)):
        if i >= len(AS_THEY_ARE):
            monkeypatch.setattr(qwen2_vl, "to_patches", lambda *_, i=i: original["pixels"][i])
        with torch.no_grad():
            ratings = reward.ratings(as_batch(clip), [text])
        monkeypatch.undo()
        torch.testing.assert_close(heads(reward, ratings)[0], original["logits"][i][:, 0], rtol=0, atol=1e-5)
        # Positions that count rows and columns would be another model.
        assert (original["counted"][i] - original["logits"][i]).abs().max() > 1e-3


def test_rounding_the_resized_pixels_moves_ratings_little(original, reward):
    for clip, text, theirs in zip(original["clips"], original["texts"], original["logits"], strict=True):
        with torch.no_grad():
            ratings = heads(reward, reward.ratings(as_batch(clip), [text]))
        torch.testing.assert_close(ratings[0], theirs[:, 0], rtol=0, atol=0.03)


def test_gradients_equal_the_models_at_the_patches(original, reward, seen):
    for i in range(len(AS_THEY_ARE)):
        pixels = as_batch(original["clips"][i]).requires_grad_()
        heads(reward, reward.ratings(pixels, original["texts"][i : i + 1])).sum().backward()
        reward.clip_features(pixels)
        (expected,) = torch.autograd.grad(seen[-1], pixels, original["gradients"][i])
        assert (pixels.grad - expected).norm() < 1e-4 * expected.norm()
        assert expected.norm() > 0
