import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from srpo_lightning.rewards import ClipReward, PickScore, Reward
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
        expected = factor * reward.compare(images(), TEXTS)
        torch.testing.assert_close(scaled.compare(images(), TEXTS), expected, rtol=1e-5, atol=1e-7)


def test_pickscore_is_the_published_one_with_its_processor_elsewhere(models, reward, tmp_path):
    """exp(logit_scale) times the cosine; the model's folder lacks tokenizer and preprocessor."""
    CLIPModel.from_pretrained(models.clip).save_pretrained(tmp_path)
    pickscore = PickScore(str(tmp_path), str(models.clip))
    pickscore.load()
    with torch.no_grad():
        expected = reward.clip.logit_scale.exp() * reward(images(), TEXTS)
        torch.testing.assert_close(pickscore(images(), TEXTS), expected, rtol=1e-6, atol=0)


def test_pickscore_cuts_overshoot_off_unless_it_is_to_be_left_as_tensors_have_it(models):
    edges = (torch.arange(64) // 8 % 2).float().expand(1, 3, 64, 64)
    cut, left = (PickScore(str(models.clip), None, clamp=clamp).preprocessing(28) for clamp in (True, False))
    white = (1 - torch.tensor(cut.mean)) / torch.tensor(cut.std)
    assert (cut(edges).amax((0, 2, 3)) <= white + 1e-5).all()
    assert (left(edges).amax((0, 2, 3)) > white + 0.01).all()


def test_scores_under_several_texts_equal_separate_calls(reward):
    """`Reward.scores`, the definition for rewards that share nothing between texts."""
    columns = [TEXTS, ["x", "y", "a cat"]]
    with torch.no_grad():
        expected = Reward.scores(reward, images(), columns)
        torch.testing.assert_close(reward.scores(images(), columns), expected, rtol=0, atol=1e-6)


def test_the_contrast_is_the_weighted_sum_of_scores(reward):
    columns, coefficients = [TEXTS, ["x", "y", "z"]], torch.tensor([[1.1, -1], [1.2, -1], [1.3, -1]])
    with torch.no_grad():
        expected = [
            sum(
                c * reward(images()[i : i + 1], [column[i]]) for c, column in zip(coefficients[i], columns, strict=True)
            )
            for i in range(3)
        ]
        torch.testing.assert_close(
            reward.contrast(images(), columns, coefficients), torch.cat(expected), rtol=0, atol=1e-6
        )


def test_an_image_goes_through_the_model_once_for_all_its_texts(reward, monkeypatch):
    calls = []
    monkeypatch.setattr(
        reward, "image_features", lambda x: calls.append(len(x)) or ClipReward.image_features(reward, x)
    )
    reward.contrast(images(), [TEXTS, ["x", "y", "z"]], torch.ones(3, 2))
    reward.compare(images(), TEXTS)
    assert calls == [3, 3]


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
    reward.contrast(pixels, [TEXTS, ["x", "y", "z"]], torch.tensor([[1.1, -1]] * 3)).sum().backward()
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


def test_an_image_with_nan_scores_nan_and_leaves_the_others_alone(reward):
    clean, broken = images(), images()
    broken[1, 0, 3, 3] = torch.nan
    with torch.no_grad():
        scores = reward(broken, TEXTS)
        assert scores.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(scores[[0, 2]], reward(clean, TEXTS)[[0, 2]])


@pytest.mark.parametrize(("factor", "offset", "span"), [(255, 0, r"\[0\.\d+, 25\d\]"), (2, -1, r"\[-0\.9\d+, ")])
def test_images_outside_0_and_1_are_refused_with_their_range(reward, factor, offset, span):
    pixels = (images() * factor + offset).requires_grad_()
    with pytest.raises(ValueError, match=rf"images span {span}.*takes them in \[0, 1\]"):
        reward(pixels, TEXTS)


def test_a_number_of_texts_other_than_that_of_images_is_refused(reward):
    with pytest.raises(ValueError, match="2 texts for 3 images"):
        reward(images(), TEXTS[:2])
    with pytest.raises(ValueError, match="one string for 3 images"):
        reward(images(), "abc")
    with pytest.raises(ValueError, match="1 texts for 3 images"):
        reward.contrast(images(), [TEXTS, ["x"]], torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"images are \[3, 1, 16, 16\]"):
        reward(images()[:, :1], TEXTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_autocast_the_model_runs_in_bfloat16_and_the_similarity_in_float32(models, dtype):
    reward = tiny.new_reward(models.clip, dtype=dtype)
    seen = []
    reward.clip.vision_model.encoder.register_forward_hook(lambda *args: seen.append(args[-1].last_hidden_state.dtype))
    reward.clip.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = reward(images(), TEXTS)
        features, texts = reward.image_features(images()), reward.text_features(TEXTS)
    assert torch.bfloat16 in seen
    assert scores.dtype == torch.float32
    assert torch.equal(scores, (features @ texts.T).diagonal())


def test_a_missing_folder_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        ClipReward(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"config.json is missing"):
        ClipReward(str(tmp_path))
