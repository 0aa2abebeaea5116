"""X-CLIP in small, against transformers' own forward pass."""

import pytest
import torch
from transformers import CLIPImageProcessor, XCLIPConfig, XCLIPModel

from srpo_lightning.rewards import XClipReward
from tests import tiny

TEXTS = ["a cat", "b", "a much longer text than fits"]
SIDE, FRAMES = 16, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tiny.clip_tokenizer()
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tiny.MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "num_frames": FRAMES,
        "mit_hidden_size": 24,
        "mit_intermediate_size": 32,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    config = XCLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=24,
        prompt_layers=2,
        prompt_num_attention_heads=2,
        prompt_alpha=0.5,
    )
    model = XCLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("xclip")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE, resample=2).save_pretrained(path)
    return path


@pytest.fixture
def reward(folder):
    loaded = XClipReward(str(folder))
    loaded.load()
    return loaded


def clips(count: int = 2, frames: int = FRAMES, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, frames, size, size, generator=torch.Generator().manual_seed(count))


def test_scores_equal_the_cosines_of_xclip_model(folder, reward):
    """transformers' XCLIPModel.forward: logits_per_video over its logit scale."""
    model = XCLIPModel.from_pretrained(folder).eval()
    tokens = tiny.clip_tokenizer()(
        TEXTS, padding=True, truncation=True, max_length=tiny.MAX_TOKENS, return_tensors="pt"
    )
    shown = clips()
    with torch.no_grad():
        pixels = reward.preprocess(shown.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, FRAMES))
        cosines = model(pixel_values=pixels, **tokens).logits_per_video / model.logit_scale.exp()
        torch.testing.assert_close(reward.compare(shown, TEXTS), cosines, rtol=0, atol=1e-6)
        torch.testing.assert_close(reward(shown, TEXTS[:2]), cosines.diagonal(), rtol=0, atol=1e-6)


def test_of_longer_clips_frames_at_equal_distances_are_read(reward):
    shown = clips(frames=5)
    with torch.no_grad():
        torch.testing.assert_close(reward(shown, TEXTS[:2]), reward(shown[:, :, ::2], TEXTS[:2]))
        assert not torch.allclose(reward(shown, TEXTS[:2]), reward(shown[:, :, :3], TEXTS[:2]), atol=1e-4)


def test_the_order_of_frames_counts(reward):
    shown = clips()
    with torch.no_grad():
        assert not torch.allclose(reward(shown, TEXTS[:2]), reward(shown.flip(2), TEXTS[:2]), atol=1e-4)


def test_the_gradient_reaches_the_pixels_of_every_frame(reward):
    shown = clips().requires_grad_()
    reward(shown, TEXTS[:2]).sum().backward()
    assert (shown.grad.abs().amax((1, 3, 4)) > 0).all()


def test_the_gradient_equals_differences(folder):
    reward = XClipReward(str(folder))
    reward.load()
    reward.double()
    shown = clips().double() * 0.8 + 0.1
    direction = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shown.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(shown, TEXTS[:2]).sum(), shown)
    slopes = (gradient * direction).sum((1, 2, 3, 4))
    with torch.no_grad():
        ahead, behind = (reward(shown + sign * 1e-5 * direction, TEXTS[:2]) for sign in (1, -1))
    assert slopes.abs().min() > 1e-4
    torch.testing.assert_close(slopes, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


def test_half_precision_changes_little_and_has_a_gradient(reward):
    """As a training reward it is called under the trainer's autocast."""
    shown = clips().requires_grad_()
    expected = reward(shown, TEXTS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward(shown, TEXTS[:2])
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05)
    scores.sum().backward()
    assert shown.grad.abs().sum() > 0


def test_clips_that_are_too_short_are_refused_before_weights_are_read(folder):
    unread = XClipReward(str(folder))
    unread.check_frames(FRAMES)
    with pytest.raises(ValueError, match=r"clips have 2 frames, and .* reads 3: raise the policy's num_reward"):
        unread.check_frames(2)
    assert unread.clip is None


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (clips(frames=2), "clips have 2 frames, and .* reads 3: raise the policy's num_rewarded_frames"),
        (torch.rand(2, 3, 24, 24), "takes clips"),
    ],
)
def test_pictures_and_short_clips_are_refused(reward, shown, message):
    with pytest.raises(ValueError, match=message):
        reward(shown, TEXTS[:2])
