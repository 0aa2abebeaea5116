import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from srpo_lightning.rewards import Term, VideoAlignReward, WeightedReward
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.qwen2_vl import smart_resize, to_patches
from srpo_lightning.rewards.video_align import INSTRUCTION, MIN_PIXELS, REWARD_TOKENS, frames_read
from tests.rewards.qwen import (
    check_columns_share_the_vision_tower,
    check_scored_alone_as_together,
    settings,
    write_base,
    write_video_reward,
)

TEXTS = ["a red apple, spinning", "Painting. a horse on Mars that jumps"]
SIZE = (280, 392)  # nothing is resized
MEAN = torch.tensor([3.6757, 1.1646, 2.8105])
STD = torch.tensor([2.2476, 1.3811, 2.5121])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """The published form, and the model as peft has it, its LoRA not merged."""
    folder = tmp_path_factory.mktemp("video_reward")
    return folder, write_video_reward(base, folder)


@pytest.fixture(scope="module")
def weights(written):
    return written[0]


@pytest.fixture(scope="module")
def reward(base, weights):
    return load(base, weights)


def load(base: Path, weights: Path, **own) -> VideoAlignReward:
    reward = VideoAlignReward(str(base), str(weights), **{"dtype": "float32"} | own)
    reward.load()
    return reward


def clips(count: int = 2, frames: int = 4, height: int = SIZE[0], width: int = SIZE[1]) -> torch.Tensor:
    return torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(count))


def pixel_gradient(reward: VideoAlignReward, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    pixels = pixels.clone().requires_grad_()
    reward(pixels, texts).sum().backward()
    return pixels.grad


def by_transformers(base: Path, wrapped: nn.Module, reward: VideoAlignReward, pixels: torch.Tensor) -> torch.Tensor:
    """What the head says at each special token, by Qwen2VLModel's own arguments and peft's own layers."""
    network = wrapped.base_model.model
    qwen = Qwen2VLModel(Qwen2VLConfig.from_pretrained(base)).eval()
    qwen.visual, qwen.language_model = network.visual, network.model
    count, _, frames, height, width = pixels.shape
    grid = [frames // 2, height // 14, width // 14]
    rows = [reward.tokenize(text, math.prod(grid) // 4) for text in TEXTS]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [reward.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    normalised = torch.stack([Preprocessing((height, width), "squash")(own) for own in pixels.unbind(2)], dim=2)
    hidden = qwen(
        input_ids=tokens,
        attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        position_ids=torch.arange(length).expand(3, count, -1),
        pixel_values_videos=to_patches(normalised, 14, 2, 2),
        video_grid_thw=torch.tensor([grid] * count),
    ).last_hidden_state
    asked = [network.rm_head(hidden[tokens == own]) for own in reward.reward_ids]
    return torch.stack(asked, dim=1)


def test_the_instruction_is_the_published_one():
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert digest == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"


def test_ratings_equal_qwen2_vl_with_its_arguments_its_lora_and_one_position_for_each_token(base, written, reward):
    pixels = clips()
    with torch.no_grad():
        expected = by_transformers(base, written[1], reward, pixels)[:, :, 0]
        ratings = reward.ratings(pixels, TEXTS)
        torch.testing.assert_close(ratings, (expected - MEAN) / STD, rtol=0, atol=1e-5)
        torch.testing.assert_close(reward(pixels, TEXTS), ratings.sum(1), rtol=0, atol=1e-6)
    assert ratings.std(0).min() > 1e-3


@pytest.mark.parametrize(("output_dim", "rslora"), [(3, False), (1, True)])
def test_a_head_of_three_numbers_gives_each_question_its_own_and_rslora_has_its_scale(
    base, tmp_path, output_dim, rslora
):
    wrapped = write_video_reward(base, tmp_path, output_dim, use_rslora=rslora)
    reward, pixels = load(base, tmp_path), clips()
    with torch.no_grad():
        each = by_transformers(base, wrapped, reward, pixels)
        expected = each.diagonal(dim1=1, dim2=2) if output_dim == 3 else each[:, :, 0]
        torch.testing.assert_close(reward.ratings(pixels, TEXTS), (expected - MEAN) / STD, rtol=0, atol=1e-5)


def test_an_adapter_with_what_was_trained_beside_it_is_the_same_model(base, written, reward, tmp_path):
    folder, _ = written
    whole = torch.load(folder / "checkpoint-11352" / "model.pth", weights_only=True)
    shutil.copytree(base, tmp_path / "qwen")
    original, beside, adapter = {}, {}, {}
    for name, tensor in whole.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" in name:
            adapter[name.replace(".default.", ".")] = tensor
        elif plain.startswith(("visual.", "rm_head.")) or "embed_tokens" in name:
            beside[name] = tensor
            original[plain] = torch.zeros_like(tensor)
        elif plain != "lm_head.weight":
            original[plain] = tensor
    del original["rm_head.weight"]
    save_file(original, tmp_path / "qwen" / "model.safetensors", {"format": "pt"})
    own = tmp_path / "reward" / "checkpoint-200"
    own.mkdir(parents=True)
    (own.parent / "checkpoint-30").mkdir()
    shutil.copy(folder / "model_config.json", own.parent)
    save_file(adapter, own / "adapter_model.safetensors", {"format": "pt"})
    torch.save(beside, own / "non_lora_state_dict.pth")
    other = load(tmp_path / "qwen", own.parent)
    for (name, ours), theirs in zip(other.network.named_parameters(), reward.network.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_patches_are_pairs_of_frames_by_squares_of_squares():
    pixels = clips(2, 4, 56, 84)
    corners = [
        (28 * row + 14 * down, 28 * column + 14 * right)
        for row in range(2)
        for column in range(3)
        for down in range(2)
        for right in range(2)
    ]
    expected = [
        clip[:, first : first + 2, y : y + 14, x : x + 14] for clip in pixels for first in (0, 2) for y, x in corners
    ]
    assert torch.equal(to_patches(pixels, patch=14, merged=2, num_frames=2), torch.stack(expected).flatten(1))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 832), (336, 588)),
        ((64, 64), (336, 336)),
        ((720, 1280), (336, 588)),
        ((600, 300), (588, 308)),
        ((448, 448), (448, 448)),
    ],
)
def test_frames_are_resized_to_between_128_and_256_tokens(size, expected):
    assert smart_resize(*size, 28, MIN_PIXELS, 200704) == expected


@pytest.mark.parametrize(
    ("num_frames", "frame_rate", "number", "expected"),
    [
        (81, 16, None, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (49, 24, None, [0, 16, 32, 48]),
        (9, 16, None, [0, 3, 5, 8]),
        (3, 16, None, [0, 2]),
        (2, 1, None, [0, 1]),
        (81, 16, 5, [0, 27, 53, 80]),
        (3, 16, 8, [0, 1, 2]),
    ],
)
def test_frames_are_read_at_two_per_second(num_frames, frame_rate, number, expected):
    assert frames_read(num_frames, frame_rate, 2.0, number) == expected


def test_a_frame_rate_reads_some_frames_and_an_odd_number_is_filled_up_by_the_last(base, weights, reward):
    sampling = load(base, weights, frame_rate=16.0)
    pixels = clips(1, 9)
    with torch.no_grad():
        assert torch.equal(sampling(pixels, TEXTS[:1]), reward(pixels[:, :, [0, 3, 5, 8]], TEXTS[:1]))
        assert torch.equal(reward(pixels[:, :, :3], TEXTS[:1]), reward(pixels[:, :, [0, 1, 2, 2]], TEXTS[:1]))


def test_the_text_counts_for_text_alignment_alone(reward):
    pixels = clips(1).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        one, other = reward.ratings(pixels, TEXTS)
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=1e-5)
    assert (one[2] - other[2]).abs() > 1e-3


def test_without_text_alignment_there_is_nothing_to_steer_by(base, weights):
    reward = VideoAlignReward(str(base), str(weights), text_alignment=0.0)
    assert not reward.reads_text
    with pytest.raises(ValueError, match="reads no text"):
        reward.check_contrast()
    with pytest.raises(ValueError, match="at least one of them not 0"):
        VideoAlignReward(str(base), str(weights), visual_quality=0.0, motion_quality=0.0, text_alignment=0.0)


def test_each_dimension_counts_by_its_factor(base, weights, reward):
    weighted = load(base, weights, visual_quality=0.5, motion_quality=2.0, text_alignment=-1.0)
    with torch.no_grad():
        expected = reward.ratings(clips(), TEXTS) @ torch.tensor([0.5, 2.0, -1.0])
        torch.testing.assert_close(weighted(clips(), TEXTS), expected, rtol=0, atol=1e-5)


def test_without_the_authors_units_ratings_are_the_heads(base, weights, reward, tmp_path):
    shutil.copytree(weights, tmp_path / "own")
    own = settings()
    del own["inference_config"]
    (tmp_path / "own" / "model_config.json").write_text(json.dumps(own))
    with torch.no_grad():
        ratings = reward.ratings(clips(), TEXTS)
        torch.testing.assert_close(load(base, tmp_path / "own").ratings(clips(), TEXTS), ratings * STD + MEAN)


def test_scores_under_several_texts_equal_one_call_each_with_one_pass_of_the_vision_tower(reward):
    check_columns_share_the_vision_tower(reward, clips(), [TEXTS, ["x", ""]])


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(reward):
    check_scored_alone_as_together(reward, clips(), TEXTS, least=1e-3)


def test_the_order_of_frames_counts(reward):
    pixels = clips(1)
    with torch.no_grad():
        forth, back = reward(pixels, TEXTS[:1]), reward(pixels.flip(2), TEXTS[:1])
    assert (forth - back).abs() > 1e-3


def test_a_sum_hands_it_clips(reward):
    summed = WeightedReward([Term(reward, weight=2.0)])
    assert summed.reads_clips
    with torch.no_grad():
        torch.testing.assert_close(summed(clips(), TEXTS), 2 * reward(clips(), TEXTS))
        with pytest.raises(ValueError, match="takes clips"):
            reward(clips()[:, :, 0], TEXTS)


@pytest.mark.parametrize(("height", "width"), [SIZE, (40, 72), (600, 300)])
def test_the_gradient_reaches_every_frame_and_no_parameter(reward, height, width):
    pixels = clips(height=height, width=width).requires_grad_()
    reward.scores(pixels, [TEXTS, TEXTS[::-1]]).sum().backward()
    assert ((pixels.grad != 0).float().mean((1, 3, 4)) > 0.9).all()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


@pytest.mark.parametrize(("height", "width"), [SIZE, (40, 72)])
def test_the_gradient_equals_central_differences(base, weights, height, width):
    """In float64, but that the model normalises and rotates in float32."""
    reward = load(base, weights).double()
    draw = torch.Generator().manual_seed(0)
    pixels = 0.25 + 0.5 * clips(1, 2, height, width).double()  # so that nothing is cut off at 0 or 1
    gradient = pixel_gradient(reward, pixels, TEXTS[:1])
    for _ in range(3):
        towards = gradient + gradient.abs().mean() * torch.randn(pixels.shape, generator=draw, dtype=torch.float64)
        step = 1e-4 * towards / towards.abs().max()
        with torch.no_grad():
            difference = reward(pixels + step, TEXTS[:1]) - reward(pixels - step, TEXTS[:1])
        assert difference.dtype == torch.float64
        torch.testing.assert_close(difference, 2 * (gradient * step).sum()[None], rtol=1e-2, atol=0)


def test_nan_in_one_clip_is_nan_in_its_score_alone(reward):
    pixels = clips()
    pixels[1, 0, 2, 5, 5] = math.nan
    with torch.no_grad():
        assert reward(pixels, TEXTS).isnan().tolist() == [False, True]


def test_weights_are_bfloat16_unless_told_but_for_the_head(base, weights, reward):
    half = VideoAlignReward(str(base), str(weights))
    half.load()
    dtypes = {name: p.dtype for name, p in half.network.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("rm_head.")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("rm_head.")} == {torch.bfloat16}
    with torch.no_grad():
        scores = half(clips(), TEXTS)
        torch.testing.assert_close(scores, reward(clips(), TEXTS), rtol=0, atol=0.05)
    assert scores.dtype == torch.float32
    assert pixel_gradient(half, clips(), TEXTS).abs().amax((1, 3, 4)).min() > 0


def test_the_text_may_hold_any_token(reward):
    """Two questions stand before it, and the third behind it."""
    row = reward.tokenize(f"a {' '.join(REWARD_TOKENS)} <|video_pad|> {{}}", 4)
    assert [row.count(own) for own in reward.reward_ids] == [2, 2, 2]
    visual, motion, alignment = (
        [place for place, own in enumerate(row) if own == token] for token in reward.reward_ids
    )
    with torch.no_grad():
        ratings = reward.ratings(clips(1), [f"a {REWARD_TOKENS[0]} and {REWARD_TOKENS[2]} cat"])
        plain = reward.ratings(clips(1), ["a cat"])
    torch.testing.assert_close(ratings[:, :2], plain[:, :2], rtol=0, atol=1e-5)
    assert reward._questions(row) == [visual[0], motion[0], alignment[1]]


def test_checkpointing_changes_neither_scores_nor_gradients(base, weights, reward):
    checkpointed = load(base, weights, gradient_checkpointing=True)
    with torch.no_grad():
        assert torch.equal(checkpointed(clips(), TEXTS), reward(clips(), TEXTS))
    assert torch.equal(pixel_gradient(checkpointed, clips(), TEXTS), pixel_gradient(reward, clips(), TEXTS))


def test_scores_and_gradients_in_4_bits_are_those_of_the_merged_weights_rounded(base, weights, reward):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    small, plain = load(base, weights, quantize="nf4"), load(base, weights)
    rounded = dict(small.network.named_modules())
    for name, layer in plain.network.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            weight = rounded[name].weight
            layer.weight.data = dequantize_4bit(weight.data, weight.quant_state)
    with torch.no_grad():
        scores, expected, exact = (own(clips(), TEXTS) for own in (small, plain, reward))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert (scores - exact).abs().max() > 1e-3
    gradient, expected = (pixel_gradient(own, clips(), TEXTS) for own in (small, plain))
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_models_that_are_asked_in_another_way_are_refused_by_the_setting(base, tmp_path):
    for group, name, value, complaint in (
        ("data_config", "prompt_template_type", "detailed", r"prompt_template_type 'detailed', .* 'detailed_special'"),
        ("data_config", "sample_type", "multi_pts", r"sample_type 'multi_pts'"),
        ("model_config", "use_special_tokens", False, r"use_special_tokens False"),
        ("model_config", "output_dim", 4, r"output_dim 4, VideoAlignReward reads 1 or 3"),
        ("data_config", "fps", None, r"lacks data_config.fps: download"),
    ):
        own = settings()
        own[group][name] = value
        if value is None:
            del own[group][name]
        (tmp_path / "model_config.json").write_text(json.dumps(own))
        with pytest.raises(ValueError, match=complaint) as error:
            VideoAlignReward(str(base), str(tmp_path))
        assert "\n" not in str(error.value)


def test_wrong_files_are_refused_with_the_cure(base, weights, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        VideoAlignReward(str(base), str(tmp_path / "nowhere"))
    (tmp_path / "model_config.json").write_text(json.dumps(settings()))
    with pytest.raises(ValueError, match=r"checkpoint-11352/model.pth is missing"):
        VideoAlignReward(str(base), str(tmp_path))
    shutil.copytree(weights, tmp_path / "own")
    path = tmp_path / "own" / "checkpoint-11352" / "model.pth"
    state = torch.load(path, weights_only=True)
    lora = next(name for name in state if ".lora_B." in name)
    torch.save({name: tensor for name, tensor in state.items() if name != lora}, path)
    with pytest.raises(ValueError, match=r"is not the weight file of Network \(1 unexpected, first .*lora_A.weight"):
        load(base, tmp_path / "own")
    torch.save({name: tensor for name, tensor in state.items() if "rm_head" not in name}, path)
    with pytest.raises(ValueError, match=r"1 missing, first rm_head.weight"):
        load(base, tmp_path / "own")
