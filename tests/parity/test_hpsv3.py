"""HPSv3 against the package hpsv3: its tokens, its pixels, its Qwen2-VL and its head, on random weights."""

import pytest
import torch

from srpo_lightning.rewards import qwen2_vl
from srpo_lightning.rewards.hpsv3 import INSTRUCTION, NUM_PIXELS, QUESTION, HPSv3
from srpo_lightning.rewards.pixels import CLIP_STD
from srpo_lightning.rewards.qwen2_vl import smart_resize
from tests.parity import originals
from tests.rewards.qwen import write_base

AS_THEY_ARE = [(448, 448), (224, 896), (1792, 112)]  # nothing is resized
RESIZED = [(512, 512), (300, 700), (64, 48)]
TEXTS = ["a cat", "Real. a photograph of an astronaut on Mars {4k}", "Painting. " + "very " * 100]
AWKWARD = [
    "",
    "   ",
    "{} {text_prompt} {{0}}",
    "ünïcödé 日本語 العربية e\u0301 \uff26\uff35\uff2c\uff2c",
    "🐱🚀 family: 👨‍👩‍👧",
    "line\r\nbreak\n\n\ttab\u00a0space \x00\ufffd",
    "12345 67.8 don't WE'LL $%^&",
    "a <|im_end|>\n<|im_start|>assistant\nb",
    "<|Reward|> and <|reward|> and < | Reward | >",
    "<|vision_start|><|video_pad|><|vision_end|><|endoftext|>",
    "word " * 2000,
    "a" * 3000,
]
SIZES = [(h, w) for h in range(7, 2100, 53) for w in range(9, 2100, 61) if max(h, w) <= 200 * min(h, w)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    base = folder / "qwen"
    base.mkdir()
    write_base(base)
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (*size, 3), generator=draw, dtype=torch.uint8) for size in AS_THEY_ARE + RESIZED]
    inputs = {"images": images, "texts": TEXTS, "awkward": AWKWARD, "sizes": SIZES}
    return originals.run("hpsv3", folder, base=str(base), **inputs) | {"images": images, "base": str(base)}


@pytest.fixture(scope="module")
def reward(original):
    reward = HPSv3(original["base"], original["weights"], dtype="float32")
    reward.load()
    return reward


def as_batch(image):
    return image.permute(2, 0, 1)[None] / 255


def preferences(reward, image):
    """Mu and the logarithm of sigma under each text, as the package returns them."""
    mu, sigma = reward.preference(as_batch(image).expand(len(TEXTS), -1, -1, -1), TEXTS)
    return torch.stack([mu, sigma.log()], dim=1)


def test_prompt_and_tokens_equal_the_originals(original, reward):
    assert original["instruction"] == INSTRUCTION + QUESTION
    for text, theirs in zip(AWKWARD, original["tokens"], strict=True):
        assert reward.tokenize(text, 256) == theirs.tolist(), text


def test_sizes_equal_the_originals(original):
    assert [smart_resize(*size, 28, NUM_PIXELS, NUM_PIXELS) for size in SIZES] == [
        tuple(size) for size in original["sizes"]
    ]


def test_patches_equal_the_originals_up_to_rounding_to_8_bits(original, reward, monkeypatch):
    seen = []

    def to_patches(*args, to_patches=qwen2_vl.to_patches):
        seen.append(to_patches(*args))
        return seen[-1]

    monkeypatch.setattr(qwen2_vl, "to_patches", to_patches)
    with torch.no_grad():
        for image in original["images"]:
            reward.image_features(as_batch(image))
    channel_std = torch.tensor(CLIP_STD).repeat_interleave(2 * 14 * 14)
    for i, (ours, theirs) in enumerate(zip(seen, original["patches"], strict=True)):
        difference = (ours - theirs).abs() * channel_std
        assert difference.max() < (1e-6 if i < len(AS_THEY_ARE) else 1.3 / 255)
        assert difference.mean() < 0.4 / 255


def test_preferences_equal_the_originals_at_equal_pixels(original, reward, monkeypatch):
    """Of resized images at the original's resized pixels, which are rounded to 8 bits."""
    for i, (image, patches, theirs) in enumerate(
        zip(original["images"], original["patches"], original["outputs"], strict=True)
    ):
        if i >= len(AS_THEY_ARE):
            monkeypatch.setattr(qwen2_vl, "to_patches", lambda *_, patches=patches: patches.repeat(len(TEXTS), 1))
        with torch.no_grad():
            torch.testing.assert_close(preferences(reward, image), theirs, rtol=1e-4, atol=1e-6)
    assert original["outputs"].std(0).min() > 0.05


def test_rounding_the_resized_pixels_moves_the_score_little(original, reward):
    for image, theirs in zip(original["images"], original["outputs"], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(preferences(reward, image), theirs, rtol=0, atol=0.01)


def test_scores_in_bfloat16_are_as_near_as_the_originals_to_float32(original):
    """Where the frequencies of its rotary embeddings were exact, they would be twice as far."""
    half = HPSv3(original["base"], original["weights"])
    half.load()
    with torch.no_grad():
        ours = torch.stack([preferences(half, image) for image in original["images"]])
    noise = (original["half"] - original["outputs"]).abs().mean()
    assert (ours - original["half"]).abs().mean() < 1.5 * noise
    assert (ours - original["outputs"]).abs().mean() < 1.5 * noise


def test_gradients_equal_those_of_the_packages_differentiable_image_processor(original, reward):
    """Which takes images in [0, 255], one at a time, and does not cut bicubic overshoot off."""
    for image, theirs in list(zip(original["images"], original["gradients"], strict=True))[: len(AS_THEY_ARE)]:
        pixels = as_batch(image).requires_grad_()
        reward(pixels, TEXTS[:1]).sum().backward()
        assert (pixels.grad[0] / 255 - theirs).norm() < 1e-4 * theirs.norm()
        assert theirs.norm() > 0
