import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from srpo_lightning.rewards import ClipReward, Reward
from tests import tiny

TEXTS = ["a cat", "b", "a much longer text than fits"]


@pytest.fixture
def reward(models):
    return tiny.new_reward(models.clip)


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def count_encoded(reward: ClipReward, monkeypatch) -> list[str]:
    encoded: list[str] = []
    encode = reward._encode
    monkeypatch.setattr(reward, "_encode", lambda text: encoded.append(text) or encode(text))
    return encoded


@pytest.mark.parametrize("size", [16, 40])
def test_scores_equal_the_cosines_of_clip_model(models, reward, size):
    """transformers' CLIPModel.forward: logits_per_image over its logit scale."""
    clip = CLIPModel.from_pretrained(models.clip)
    tokens = CLIPTokenizer.from_pretrained(models.clip)(
        TEXTS, padding=True, truncation=True, max_length=tiny.MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = reward.preprocess(images(size=size))
        cosines = clip(pixel_values=pixels, **tokens).logits_per_image / clip.logit_scale.exp()
        torch.testing.assert_close(reward.compare(images(size=size), TEXTS), cosines, rtol=0, atol=1e-6)
        torch.testing.assert_close(reward(images(size=size), TEXTS), cosines.diagonal(), rtol=0, atol=1e-6)


def test_the_logit_scale_divisor_scales_the_cosine(models, reward):
    """PickScore in SRPO: times logit_scale / 20."""
    scaled = tiny.new_reward(models.clip, logit_scale_divisor=20.0)
    factor = float(scaled.clip.logit_scale.exp()) / 20
    with torch.no_grad():
        torch.testing.assert_close(scaled(images(), TEXTS), factor * reward(images(), TEXTS), rtol=1e-6, atol=0)
        for method in ("compare", "relative"):
            extra = (TEXTS,) if method == "compare" else (TEXTS, TEXTS[::-1], torch.tensor([0.1, 0.2, 0.3]))
            expected = factor * getattr(reward, method)(images(), *extra)
            torch.testing.assert_close(getattr(scaled, method)(images(), *extra), expected, rtol=1e-5, atol=1e-7)


def test_the_relative_reward_equals_two_calls(reward):
    """`Reward.relative`, the definition for rewards that are no dot product."""
    weight, others = torch.tensor([0.1, 0.2, 0.3]), ["x", "y", "z"]
    with torch.no_grad():
        expected = Reward.relative(reward, images(), TEXTS, others, weight)
        torch.testing.assert_close(reward.relative(images(), TEXTS, others, weight), expected, rtol=0, atol=1e-6)


def test_comparing_equals_scoring_one_by_one(reward):
    """`Reward.compare`, the definition."""
    with torch.no_grad():
        expected = Reward.compare(reward, images(2), TEXTS)
        torch.testing.assert_close(reward.compare(images(2), TEXTS), expected, rtol=0, atol=1e-6)


def test_each_distinct_text_is_encoded_once(reward, monkeypatch):
    encoded = count_encoded(reward, monkeypatch)
    reward(images(4), ["a", "b", "a", "b"])
    reward(images(2), ["b", "c"])
    assert encoded == ["a", "b", "c"]


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(models, monkeypatch):
    reward = tiny.new_reward(models.clip, cache_size=2)
    encoded = count_encoded(reward, monkeypatch)
    for text in ("a", "b", "a", "c"):  # "b" goes
        reward.text_features([text])
    reward.text_features(["a", "c"])
    assert encoded == ["a", "b", "c"]
    reward.text_features(["b"])
    assert encoded == ["a", "b", "c", "b"]
    assert reward.text_features(["p", "q", "r", "s"]).shape == (4, 16)
    assert len(reward._text_features) == 2


def test_features_do_not_depend_on_the_texts_they_are_encoded_with(models):
    """Bit for bit: a resumed run starts with an empty cache and meets other texts together."""
    together = tiny.new_reward(models.clip).text_features(TEXTS)
    apart = torch.cat([tiny.new_reward(models.clip).text_features([text]) for text in TEXTS])
    assert torch.equal(together, apart)


def test_features_cached_in_inference_mode_serve_a_gradient_later(reward):
    with torch.inference_mode():
        reward(images(), TEXTS)
    pixels = images().requires_grad_()
    reward(pixels, TEXTS).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_features_are_computed_in_full_precision_under_autocast(models, reward):
    with torch.autocast("cpu", torch.bfloat16):
        features = reward.text_features(TEXTS)
    assert torch.equal(features, tiny.new_reward(models.clip).text_features(TEXTS))


@pytest.mark.parametrize("size", [16, 40])
def test_the_gradient_reaches_every_image_and_no_parameter(reward, size):
    pixels = images(size=size).requires_grad_()
    reward.relative(pixels, TEXTS, ["x", "y", "z"], torch.tensor([0.1, 0.2, 0.3])).sum().backward()
    assert (pixels.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


def test_a_reward_stays_in_evaluation_mode(reward):
    reward.train()
    assert not any(module.training for module in reward.modules())


def test_moving_the_reward_computes_its_features_anew_and_staying_does_not(reward, monkeypatch):
    encoded = count_encoded(reward, monkeypatch)
    reward.text_features(TEXTS)
    reward.to("cpu").text_features(TEXTS)
    assert encoded == TEXTS
    assert reward.double().text_features(TEXTS).dtype == torch.float64


def test_the_constructor_reads_no_weights_and_load_reads_them_once(models):
    reward = ClipReward(str(models.clip))
    assert list(reward.parameters()) == []
    reward.load()
    clip = reward.clip
    reward.load()
    assert reward.clip is clip


def test_a_missing_folder_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        ClipReward(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"config.json is missing"):
        ClipReward(str(tmp_path))
