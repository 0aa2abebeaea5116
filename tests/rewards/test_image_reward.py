import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from srpo_lightning.rewards import image_reward
from srpo_lightning.rewards.base import Reward
from srpo_lightning.rewards.image_reward import ImageReward
from tests.rewards.gradients import assert_gradient_equals_differences

CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + c for c in CHARACTERS)]
TEXTS = ["a cat", "b", "a much longer text than the others, longer than thirty five tokens by far"]
WIDTH, VISION_WIDTH, SIDE = 16, 8, 32
VIT = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
}
MED_CONFIG = {
    "model_type": "bert",
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": 5,
}


def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,)))


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))


def attention(name: str, width: int, source: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from linear(f"{name}.self.query", width, width)
    for part in ("key", "value"):
        yield from linear(f"{name}.self.{part}", source, width)
    yield from linear(f"{name}.output.dense", width, width)
    yield from norm(f"{name}.output.LayerNorm", width)


def published_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of ImageReward.pt."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    yield from ((f"{vision}.cls_token", (1, 1, VISION_WIDTH)), (f"{vision}.pos_embed", (1, 5, VISION_WIDTH)))
    yield f"{vision}.patch_embed.proj.weight", (VISION_WIDTH, 3, 16, 16)
    yield f"{vision}.patch_embed.proj.bias", (VISION_WIDTH,)
    for part in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        yield from norm(f"{vision}.{part}", VISION_WIDTH)
    yield from linear(f"{vision}.blocks.0.attn.qkv", VISION_WIDTH, 3 * VISION_WIDTH)
    yield from linear(f"{vision}.blocks.0.attn.proj", VISION_WIDTH, VISION_WIDTH)
    yield from linear(f"{vision}.blocks.0.mlp.fc1", VISION_WIDTH, 16)
    yield from linear(f"{vision}.blocks.0.mlp.fc2", 16, VISION_WIDTH)
    yield f"{text}.embeddings.word_embeddings.weight", (MED_CONFIG["vocab_size"], WIDTH)
    yield f"{text}.embeddings.position_embeddings.weight", (40, WIDTH)
    yield from norm(f"{text}.embeddings.LayerNorm", WIDTH)
    yield from attention(f"{text}.encoder.layer.0.attention", WIDTH, WIDTH)
    yield from attention(f"{text}.encoder.layer.0.crossattention", WIDTH, VISION_WIDTH)
    yield from linear(f"{text}.encoder.layer.0.intermediate.dense", WIDTH, 32)
    yield from linear(f"{text}.encoder.layer.0.output.dense", 32, WIDTH)
    yield from norm(f"{text}.encoder.layer.0.output.LayerNorm", WIDTH)
    yield from linear("blip.vision_proj", VISION_WIDTH, 4)
    yield from linear("blip.text_proj", WIDTH, 4)
    for place, (inputs, outputs) in {0: (WIDTH, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        yield from linear(f"mlp.layers.{place}", inputs, outputs)


def published_state() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) == 2 else 4
        ones = "norm" in name.lower() and name.endswith("weight")
        state[name] = torch.randn(shape, generator=draw) / fan_in**0.5 + ones
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def write_tokenizer(folder: Path, vocabulary: list[str]) -> Path:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in VIT.items():
        monkeypatch.setitem(image_reward.VIT_LARGE, name, value)


def write_model(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    torch.save(state, folder / "ImageReward.pt")
    return write_tokenizer(folder, VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("image_reward"), published_state())


def new_reward(folder: Path, **settings) -> ImageReward:
    reward = ImageReward(str(folder), str(folder), **settings)
    reward.load()
    return reward


@pytest.fixture
def reward(folder) -> ImageReward:
    return new_reward(folder)


def images(count: int = 3, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def test_scores_are_the_published_normalisation_of_the_heads_output(tmp_path, reward):
    """A head that gives its last bias whatever it sees."""
    state = published_state()
    state["mlp.layers.7.weight"].zero_()
    state["mlp.layers.7.bias"].fill_(2.0)
    constant = new_reward(write_model(tmp_path, state))
    expected = (2 - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(constant(images(), TEXTS), torch.full((3,), expected), rtol=1e-6, atol=0)
    assert reward(images(), TEXTS).std() > 0.01


@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 51)])
def test_scoring_several_texts_equals_scoring_one_by_one(reward, size):
    """`Reward.scores` and `Reward.compare`, the definitions."""
    columns = [TEXTS, TEXTS[::-1]]
    pixels = images(3, *size)
    with torch.no_grad():
        expected = Reward.scores(reward, pixels, columns)
        torch.testing.assert_close(reward.scores(pixels, columns), expected, rtol=0, atol=1e-6)
        alone = torch.cat([reward(pixels[i : i + 1], [TEXTS[i]]) for i in range(3)])
        torch.testing.assert_close(expected[:, 0], alone, rtol=0, atol=1e-5)
        compared = reward.compare(pixels, TEXTS)
        torch.testing.assert_close(compared.diagonal(), alone, rtol=0, atol=1e-5)
    assert compared.std(0).min() > 1e-3
    assert compared.std(1).min() > 1e-3


def test_each_image_is_encoded_once_however_many_texts_it_is_scored_under(reward, monkeypatch):
    batches = []
    encode = reward.model.visual_encoder.forward
    monkeypatch.setattr(
        reward.model.visual_encoder,
        "forward",
        lambda pixel_values: batches.append(len(pixel_values)) or encode(pixel_values=pixel_values),
    )
    reward.contrast(images(), [TEXTS, TEXTS[::-1], TEXTS], torch.ones(3, 3))
    assert batches == [3]


def test_the_gradient_equals_finite_differences(reward):
    """Through the resize."""
    reward.double()
    pixels = (images(3, 40, 36).double() * 0.5 + 0.25).requires_grad_()
    assert_gradient_equals_differences(reward, pixels, TEXTS, least=1e-3)


def test_the_gradient_reaches_no_parameter(reward):
    reward(images().requires_grad_(), TEXTS).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())


def test_nan_in_one_image_is_nan_in_its_score_alone(reward):
    pixels = images()
    clean = reward.compare(pixels, TEXTS)
    pixels[1, 0, 3, 3] = float("nan")
    spoilt = reward.compare(pixels, TEXTS)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_float32_and_near_under_autocast_and_with_weights_in_bfloat16(folder, reward, dtype):
    other = new_reward(folder, dtype=dtype)
    assert {p.dtype for p in other.model.visual_encoder.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = other(images(), TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(scores, reward(images(), TEXTS), rtol=0, atol=0.05)
        assert not torch.equal(scores, reward(images(), TEXTS))


def test_the_head_computes_in_float32_under_autocast(reward):
    features = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.model.mlp(features)
    assert torch.equal(scores, reward.model.mlp(features))


def test_the_constructor_reads_no_weights_and_load_reads_them_once(folder):
    reward = ImageReward(str(folder), str(folder))
    assert list(reward.parameters()) == []
    reward.load()
    model = reward.model
    reward.load()
    assert reward.model is model
    assert not any(tensor.is_meta for tensor in [*reward.parameters(), *reward.buffers()])


def test_the_weight_file_itself_is_taken_beside_its_configuration(folder, reward):
    by_path = ImageReward(str(folder / "ImageReward.pt"), str(folder))
    by_path.load()
    assert torch.equal(by_path(images(), TEXTS), reward(images(), TEXTS))


def test_what_scoring_does_not_need_may_be_absent(tmp_path, reward):
    state = {name: value for name, value in published_state().items() if name not in image_reward.UNUSED}
    assert len(state) == len(published_state()) - 5
    without = new_reward(write_model(tmp_path, state))
    assert torch.equal(without(images(), TEXTS), reward(images(), TEXTS))


def test_another_models_weights_are_refused_by_name(folder, tmp_path):
    state = published_state()
    state["blip.itm_head.weight"] = state.pop("mlp.layers.7.bias")
    state["blip.visual_encoder.blocks.1.norm1.bias"] = torch.zeros(VISION_WIDTH)
    state["mlp.layers.6.bias"] = torch.zeros(17)
    reward = ImageReward(str(write_model(tmp_path, state)), str(folder))
    with pytest.raises(
        ValueError,
        match=r"not the weight file of ImageRewardModel \(1 missing, first mlp\.layers\.7\.bias; "
        r"2 unexpected, first itm_head\.weight, visual_encoder\.encoder\.layers\.1\.layer_norm1\.bias; "
        r"1 of another shape, first mlp\.layers\.6\.bias\): give the file",
    ):
        reward.load()


def test_another_tokenizer_is_refused_before_the_weights_are_read(folder, tmp_path):
    write_tokenizer(tmp_path, VOCABULARY[:-1])
    with pytest.raises(ValueError, match=r"has 58 tokens with \[DEC\] and \[ENC\], .* 59: give bert-base-uncased"):
        ImageReward(str(folder), str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"has \d tokens .* 59: give bert-base-uncased"):
        ImageReward(str(folder), str(tmp_path))


def test_a_missing_folder_is_refused_with_the_cure(folder, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model"):
        ImageReward(str(tmp_path / "nowhere"), str(folder))
    with pytest.raises(ValueError, match=r"med_config.json is missing"):
        ImageReward(str(tmp_path), str(folder))
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model"):
        ImageReward(str(folder), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"tokenizer_config.json is missing"):
        ImageReward(str(folder), str(tmp_path))


def test_one_text_for_each_image_is_asked_for(reward):
    for call in (lambda: reward(images(), TEXTS[:2]), lambda: reward.scores(images(), [TEXTS, TEXTS[:2]])):
        with pytest.raises(ValueError, match="2 texts for 3 images"):
            call()
