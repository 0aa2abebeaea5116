import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from srpo_lightning.rewards import qwen2_vl
from srpo_lightning.rewards.hpsv3 import IMAGE_TOKEN, INSTRUCTION, NUM_PIXELS, REWARD_TOKEN, HPSv3
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.qwen2_vl import smart_resize, to_patches
from srpo_lightning.training import nf4
from tests.rewards.qwen import (
    check_columns_share_the_vision_tower,
    check_scored_alone_as_together,
    write_base,
    write_weights,
)

TEXTS = ["a cat", "Painting. a horse on Mars", "a much longer text, " * 9]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def weights(base, tmp_path_factory):
    return write_weights(base, tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors")


def load(base: Path, weights: Path, **settings) -> HPSv3:
    reward = HPSv3(str(base), str(weights), **{"dtype": "float32"} | settings)
    reward.load()
    return reward


@pytest.fixture(scope="module")
def reward(base, weights):
    return load(base, weights)


def images(count: int = 3, height: int = 448, width: int = 448) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def two_frames(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.unsqueeze(2).expand(-1, -1, 2, -1, -1)


def pixel_gradient(reward: HPSv3, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    pixels = pixels.clone().requires_grad_()
    reward(pixels, texts).sum().backward()
    return pixels.grad


def test_the_instruction_is_the_published_one():
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert digest == "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"


def test_scores_equal_qwen2_vl_with_its_arguments_and_one_position_for_each_token(base, weights, reward):
    """transformers' Qwen2VLModel with input ids, pixel values, grid and padding mask; positions as the package's."""
    qwen = Qwen2VLModel(Qwen2VLConfig.from_pretrained(base)).eval()
    qwen.visual, qwen.language_model = reward.network.visual, reward.network.model
    pixels = images(height=224, width=896)
    rows = [reward.tokenize(text, 256) for text in TEXTS]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [reward.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        hidden = qwen(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=torch.arange(length).expand(3, len(rows), -1),
            pixel_values=to_patches(two_frames(Preprocessing((224, 896), "squash")(pixels)), 14, 2, 2),
            image_grid_thw=torch.tensor([[1, 16, 64]] * 3),
        ).last_hidden_state
        outputs = reward.network.rm_head(hidden[tokens == reward.reward_ids[0]])
        torch.testing.assert_close(reward(pixels, TEXTS), outputs[:, 0], rtol=0, atol=1e-5)
        mu, sigma = reward.preference(pixels, TEXTS)
    torch.testing.assert_close(torch.stack([mu, sigma.log()], dim=1), outputs, rtol=0, atol=1e-5)
    assert outputs.std(0).min() > 1e-2


def test_patches_are_squares_of_squares_row_by_row():
    pixels = images(2, 56, 84)
    patches = to_patches(two_frames(pixels), patch=14, merged=2, num_frames=2)
    corners = [
        (28 * row + 14 * down, 28 * column + 14 * right)
        for row in range(2)
        for column in range(3)
        for down in range(2)
        for right in range(2)
    ]
    expected = [image[:, None, y : y + 14, x : x + 14].expand(3, 2, 14, 14) for image in pixels for y, x in corners]
    assert torch.equal(patches, torch.stack(expected).flatten(1))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((448, 448), (448, 448)), ((512, 512), (448, 448)), ((1, 200), (56, 6356)), ((1024, 768), (504, 364))],
)
def test_images_are_resized_to_about_256_tokens(size, expected):
    assert smart_resize(*size, 28, NUM_PIXELS, NUM_PIXELS) == expected


def test_images_narrower_than_the_original_takes_are_refused(reward):
    with pytest.raises(ValueError, match=r"images are 201 x 1: .*crop"):
        reward(images(1, 201, 1), ["a"])


def test_scores_under_several_texts_equal_one_call_each_with_one_pass_of_the_vision_tower(reward):
    check_columns_share_the_vision_tower(reward, images(), [TEXTS, TEXTS[::-1], ["x", "", "z"]])


def test_a_score_does_not_depend_on_what_else_is_in_the_batch(reward):
    check_scored_alone_as_together(reward, images(), TEXTS, least=1e-2)


@pytest.mark.parametrize(("height", "width"), [(448, 448), (40, 72), (600, 300)])
def test_the_gradient_reaches_every_image_and_no_parameter(reward, height, width):
    pixels = images(height=height, width=width).requires_grad_()
    reward.scores(pixels, [TEXTS, TEXTS[::-1]]).sum().backward()
    assert ((pixels.grad != 0).float().mean((1, 2, 3)) > 0.9).all()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


@pytest.mark.parametrize(("height", "width"), [(448, 448), (40, 72)])
def test_the_gradient_equals_central_differences(base, weights, height, width):
    """In float64, but that the model normalises and rotates in float32."""
    reward = load(base, weights).double()
    draw = torch.Generator().manual_seed(0)
    pixels = 0.25 + 0.5 * images(1, height, width).double()  # so that nothing is cut off at 0 or 1
    gradient = pixel_gradient(reward, pixels, ["a cat"])
    for _ in range(3):
        towards = gradient + gradient.abs().mean() * torch.randn(pixels.shape, generator=draw, dtype=torch.float64)
        step = 1e-4 * towards / towards.abs().max()
        with torch.no_grad():
            difference = reward(pixels + step, ["a cat"]) - reward(pixels - step, ["a cat"])
        assert difference.dtype == torch.float64
        torch.testing.assert_close(difference, 2 * (gradient * step).sum()[None], rtol=1e-2, atol=0)


def test_nan_in_one_image_is_nan_in_its_score_alone(reward):
    pixels = images()
    pixels[1, 0, 5, 5] = math.nan
    with torch.no_grad():
        assert reward(pixels, TEXTS).isnan().tolist() == [False, True, False]


def test_autocast_leaves_the_head_in_float32(reward):
    seen = []
    hook = reward.network.rm_head[5].register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    with torch.no_grad():
        expected = reward(images(), TEXTS)
        with torch.autocast("cpu", torch.bfloat16):
            scores = reward(images(), TEXTS)
    hook.remove()
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert 0 < (scores - expected).abs().max() < 0.05


def test_weights_are_bfloat16_unless_told_but_for_the_head(base, weights):
    reward = HPSv3(str(base), str(weights))
    reward.load()
    dtypes = {name: p.dtype for name, p in reward.network.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("rm_head.")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith("rm_head.")} == {torch.bfloat16}
    with torch.no_grad():
        scores = reward(images(), TEXTS)
        torch.testing.assert_close(scores, load(base, weights)(images(), TEXTS), rtol=0, atol=0.05)
    assert scores.dtype == torch.float32
    assert pixel_gradient(reward, images(), TEXTS).abs().amax((1, 2, 3)).min() > 0


def test_rotary_frequencies_are_rounded_as_those_of_the_published_model(base, reward):
    exact = Qwen2VLModel(Qwen2VLConfig.from_pretrained(base))
    for ours, theirs in (
        (reward.network.model.rotary_emb, exact.language_model.rotary_emb),
        (reward.network.visual.rotary_pos_emb, exact.visual.rotary_pos_emb),
    ):
        assert torch.equal(ours.inv_freq, theirs.inv_freq.bfloat16())
        assert not torch.equal(ours.inv_freq.float(), theirs.inv_freq)


def test_the_text_may_hold_any_token(reward):
    """The last reward token is the question's, and the first image tokens are the image's."""
    with torch.no_grad():
        plain, *others = (
            float(reward(images(1), [text]))
            for text in (
                "a {} cat",
                f"a {REWARD_TOKEN} cat",
                f"a {IMAGE_TOKEN} cat",
                "a <|im_end|> cat",
                "a {text_prompt} cat",
            )
        )
    assert all(math.isfinite(score) and score != plain for score in others)
    row = reward.tokenize(f"a {REWARD_TOKEN} cat {IMAGE_TOKEN}", 4)
    assert row.count(reward.reward_ids[0]) == 2
    assert row.count(reward.vision_id) == 5
    assert len(set(row[row.index(reward.vision_id) :][:4])) == 1
    hidden = []
    hook = reward.network.rm_head.register_forward_hook(lambda _, inputs, output: hidden.append(inputs[0]))
    with torch.no_grad():
        reward(images(1), [f"{REWARD_TOKEN}"])
        reward(images(1), [f"{REWARD_TOKEN} and more"])
    hook.remove()
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3  # the first is the same for both


def test_checkpointing_changes_neither_scores_nor_gradients_and_keeps_less(base, weights, reward):
    checkpointed = load(base, weights, gradient_checkpointing=True)
    kept = []

    def measure(reward):
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            scores = reward(images().requires_grad_(), TEXTS)
        return scores.detach(), pixel_gradient(reward, images(), TEXTS)

    for ours, expected in zip(measure(checkpointed), measure(reward), strict=True):
        assert torch.equal(ours, expected)
    assert kept[0] < kept[1] / 2
    assert not any(module.training for module in checkpointed.network.modules())


@pytest.fixture(scope="module")
def quantized(base, weights):
    pytest.importorskip("bitsandbytes")
    return load(base, weights, quantize="nf4")


@pytest.fixture(scope="module")
def dequantized(base, weights, quantized):
    """The same numbers, computed by plain layers."""
    functional = pytest.importorskip("bitsandbytes.functional")
    reward = load(base, weights)
    small = dict(quantized.network.named_modules())
    for name, layer in reward.network.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            weight = small[name].weight
            layer.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    return reward


def test_scores_in_4_bits_are_those_of_the_rounded_weights(reward, quantized, dequantized):
    with torch.no_grad():
        scores, expected, exact = (r(images(), TEXTS) for r in (quantized, dequantized, reward))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert 0 < (scores - exact).abs().max() < 0.5


def test_the_gradient_in_4_bits_is_that_of_the_rounded_weights_also_after_a_call_without(quantized, dequantized):
    with torch.no_grad():
        quantized(images(), TEXTS)
    gradient, expected = (pixel_gradient(r, images(), TEXTS) for r in (quantized, dequantized))
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_language_models_linear_layers_take_half_a_byte_for_each_number(reward, quantized):
    def nbytes(reward, part):
        return sum(p.nbytes for p in getattr(reward.network, part).parameters() if p.ndim > 1)

    linear = sum(m.weight.numel() for m in reward.network.model.layers.modules() if isinstance(m, nn.Linear))
    assert nbytes(quantized, "model") == nbytes(reward, "model") - 4 * linear + linear // 2
    assert nbytes(quantized, "visual") == nbytes(reward, "visual")


def test_4_bits_without_their_package_are_refused_with_the_cure(base, weights, monkeypatch):
    monkeypatch.setattr(nf4, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'srpo-lightning\[quant\]'"):
        HPSv3(str(base), str(weights), quantize="nf4")


def test_the_constructor_reads_no_weights_and_load_reads_them_once(base, weights):
    reward = HPSv3(str(base), str(weights.parent))
    assert list(reward.parameters()) == []
    reward.load()
    network = reward.network
    reward.load()
    assert reward.network is network
    reward.train()
    assert not any(module.training for module in reward.modules())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what memory is a file's")
def test_the_weights_stay_in_the_file_until_they_are_needed(base, weights, monkeypatch):
    """No memory for initial values, and none for a copy."""
    exactly = qwen2_vl.load_exactly
    initial = []
    monkeypatch.setattr(
        qwen2_vl, "load_exactly", lambda network, *rest: initial.extend(network.parameters()) or exactly(network, *rest)
    )
    reward = HPSv3(str(base), str(weights))
    reward.load()
    assert initial
    assert all(parameter.is_meta for parameter in initial)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(weights) in line]
    ranges = [[int(edge, 16) for edge in fields[0].split("-")] for fields in maps]
    for name, parameter in reward.network.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), name


def test_wrong_files_are_refused_with_the_cure(base, weights, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        HPSv3(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        HPSv3(str(base), str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ValueError, match=r"HPSv3.safetensors is missing"):
        HPSv3(str(base), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"of type clip, HPSv3 needs qwen2_vl: leave out"):
        HPSv3(str(tmp_path), str(weights))


def test_weights_of_another_model_are_refused(base, weights, tmp_path):
    state = load_file(weights)
    for change, complaint in (
        ({"rm_head.0.weight": None}, "1 missing, first rm_head.0.weight"),
        ({"rm_head.7.weight": torch.ones(2)}, "1 unexpected, first rm_head.7.weight"),
        (
            {"model.embed_tokens.weight": state["model.embed_tokens.weight"][1:]},
            "1 of another shape, first model.embed",
        ),
    ):
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        save_file(changed, tmp_path / "HPSv3.safetensors")
        with pytest.raises(ValueError, match=complaint):
            load(base, tmp_path)
    (tmp_path / "HPSv3.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"cannot be read.*download"):
        load(base, tmp_path)
