"""The published arithmetic of the heads is written out once more here, in numpy, on transformers' own models."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionModel,
)

from srpo_lightning.rewards import aesthetic
from srpo_lightning.rewards.aesthetic import AestheticReward, AestheticV25, LaionAesthetic
from srpo_lightning.rewards.base import Reward
from tests.rewards.gradients import assert_gradient_equals_differences

SIDE, PROJECTED, VISION_WIDTH = 16, 24, 16
TEXTS = ["a cat", "b", "c"]
LAYERS = {"hidden_size": VISION_WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": SIDE, "patch_size": 8}
TEXT = LAYERS | {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


class Published(NamedTuple):
    """A class, what its files are, and how to call it."""

    reward: type[AestheticReward]
    head: Path
    whole: Path
    encoder: Path

    def load(self, **settings) -> AestheticReward:
        reward = self.reward(str(self.head), **{"pretrained": str(self.whole)} | settings)
        reward.load()
        return reward


def head_state(width: int, name: str, places: list[int]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(width)
    state = {}
    for place, inputs, outputs in zip(places, [width, 1024, 128, 64, 16], [1024, 128, 64, 16, 1], strict=True):
        state[f"{name}.{place}.weight"] = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
        state[f"{name}.{place}.bias"] = torch.randn(outputs, generator=draw)
    return state


def write(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Published]:
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTED))
    siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    for model in (clip, siglip):
        for name, parameter in model.named_parameters():  # as initialised all images have nearly the same features
            if name.startswith("vis") and parameter.ndim > 1 and "position" not in name:
                torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    clip.save_pretrained(folder / "clip")
    siglip.save_pretrained(folder / "siglip")
    encoder = CLIPVisionModelWithProjection(clip.config.vision_config.__class__(**VISION, projection_dim=PROJECTED))
    encoder.vision_model, encoder.visual_projection = clip.vision_model, clip.visual_projection
    encoder.save_pretrained(folder / "clip_encoder")
    encoder = SiglipVisionModel(siglip.config.vision_config)
    encoder.load_state_dict(siglip.vision_model.state_dict())
    encoder.save_pretrained(folder / "siglip_encoder")
    # OpenAI's file holds a constant too.
    state = load_file(folder / "clip/model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, folder / "clip/model.safetensors")
    draw = torch.Generator().manual_seed(1)
    linear = {"weight": torch.randn(1, PROJECTED, generator=draw), "bias": torch.randn(1, generator=draw)}
    improved = head_state(PROJECTED, "layers", [0, 2, 4, 6, 7])
    v25 = head_state(VISION_WIDTH, "scoring_head", [0, 2, 4, 6, 8])
    on_clip = (folder / "clip", folder / "clip_encoder")
    return {
        "linear": Published(LaionAesthetic, write(linear, folder / "sa_0_4_vit_l_14_linear.pth"), *on_clip),
        "improved": Published(LaionAesthetic, write(improved, folder / "sac+logos+ava1-l14-linearMSE.pth"), *on_clip),
        "v2.5": Published(
            AestheticV25,
            write(v25, folder / "aesthetic_predictor_v2_5.pth"),
            folder / "siglip",
            folder / "siglip_encoder",
        ),
    }


@pytest.fixture(params=["linear", "improved", "v2.5"])
def model(request, published) -> Published:
    return published[request.param]


@pytest.fixture
def reward(model) -> AestheticReward:
    return model.load()


def images(count: int = 3, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """Noise of a colour of its own for each."""
    draw = torch.Generator().manual_seed(count)
    return 0.7 * torch.rand(count, 3, 1, 1, generator=draw) + 0.3 * torch.rand(count, 3, height, width, generator=draw)


def smooth(height: int, width: int) -> np.ndarray:
    """8-bit values with detail but no noise, like a photograph's; PIL clamps twice: leave it room."""
    y, x = np.meshgrid(np.linspace(0, 6, height), np.linspace(0, 9, width), indexing="ij")
    waves = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.cos(x * y)], axis=-1)
    return ((waves * 0.35 + 0.5) * 255).round().astype(np.uint8)


def features_by_transformers(model: Published, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        if model.reward is LaionAesthetic:
            clip = CLIPModel.from_pretrained(model.whole)
            features = clip.get_image_features(pixel_values=pixels).pooler_output
        else:
            features = SiglipModel.from_pretrained(model.whole).vision_model(pixel_values=pixels).pooler_output
    return features.numpy().astype(np.float64)


def scores_by_numpy(model: Published, features: np.ndarray) -> np.ndarray:
    """Features over their length, then each linear layer of the file in turn."""
    state = {name: value.numpy().astype(np.float64) for name, value in torch.load(model.head).items()}
    values = features / np.sqrt((features**2).sum(1, keepdims=True))
    for name in sorted(name for name in state if name.endswith("weight")):
        values = values @ state[name].T + state[name.replace("weight", "bias")]
    return values[:, 0]


@pytest.mark.parametrize("size", [(SIDE, SIDE), (20, 37)])
def test_scores_equal_the_published_arithmetic_on_transformers_features(model, reward, size):
    pixels = reward.preprocess(images(4, *size))
    expected = scores_by_numpy(model, features_by_transformers(model, pixels))
    with torch.no_grad():
        scores = reward(images(4, *size), ["", "a", "b", "c"])
    assert expected.std() > 0.05
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


SIZES = [(16, 16), (48, 80), (49, 98), (31, 17), (16, 19), (9, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_siglips(published, size):
    """transformers' SiglipImageProcessor on the same 8-bit picture, to one step of 8 bits."""
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=Image.Resampling.BICUBIC)
    picture = smooth(*size)
    theirs = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    ours = published["v2.5"].load().preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape
    assert ((ours - theirs) * 0.5).abs().max() <= 1.125 / 255


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_openai_clips(published, size):
    """PIL's resize, torchvision's corner of the crop; where that is no half, transformers' CLIPImageProcessor."""
    picture = smooth(*size)
    short = min(size)
    height, width = (SIDE * side // short for side in size)
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    resized = np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    cropped = torch.from_numpy(resized[top : top + SIDE, left : left + SIDE]).permute(2, 0, 1) / 255
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = (cropped - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) / std
    ours = published["linear"].load().preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert ((ours[0] - expected) * std).abs().max() <= 1.125 / 255
    if (height - SIDE) % 2 == (width - SIDE) % 2 == 0:
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        theirs = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
        torch.testing.assert_close(expected[None], theirs, rtol=0, atol=1e-6)


def test_the_image_encoder_by_itself_gives_the_same_scores(model, reward):
    alone = model.load(pretrained=str(model.encoder))
    assert torch.equal(alone(images(), TEXTS), reward(images(), TEXTS))


def test_the_text_encoder_is_never_read(model, monkeypatch):
    read = []

    class Recorder:
        def __init__(self, *args):
            self.file = open_file(*args)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    open_file = aesthetic.safe_open
    monkeypatch.setattr(aesthetic, "safe_open", Recorder)
    reward = model.load()
    assert sorted(read) == sorted(reward.encoder.state_dict())
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in read)


def test_all_texts_score_an_image_alike_and_it_is_encoded_once(reward, monkeypatch):
    """`Reward.scores` and `Reward.compare`, the definitions."""
    batches = []
    encode = reward.encoder.vision_model.forward
    monkeypatch.setattr(
        reward.encoder.vision_model,
        "forward",
        lambda pixel_values: batches.append(len(pixel_values)) or encode(pixel_values=pixel_values),
    )
    columns = [TEXTS, TEXTS[::-1]]
    scores, compared = reward.scores(images(), columns), reward.compare(images(), TEXTS)
    assert batches == [3, 3]
    assert torch.equal(scores, Reward.scores(reward, images(), columns))
    assert torch.equal(compared, Reward.compare(reward, images(), TEXTS))
    assert torch.equal(scores[:, 0], reward(images(), ["x"] * 3))


def test_nothing_can_be_contrasted(reward):
    with pytest.raises(ValueError, match="reads no text"):
        reward.contrast(images(), [TEXTS, TEXTS], torch.ones(3, 2))


def test_one_text_for_each_image_is_asked_for(reward):
    for call in (lambda: reward(images(), TEXTS[:2]), lambda: reward.scores(images(), [TEXTS, TEXTS[:2]])):
        with pytest.raises(ValueError, match="2 texts for 3 images"):
            call()


def test_the_gradient_equals_finite_differences(reward):
    """Through the resize; also through `scores`."""
    reward.double()
    pixels = (images(3, 20, 18).double() * 0.5 + 0.25).requires_grad_()
    gradient = assert_gradient_equals_differences(reward, pixels, TEXTS, least=1e-4)
    (twofold,) = torch.autograd.grad(reward.scores(pixels, [TEXTS, TEXTS]).sum(), pixels)
    torch.testing.assert_close(twofold, 2 * gradient)


def test_the_gradient_reaches_no_parameter(reward):
    reward(images().requires_grad_(), TEXTS).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())
    reward.train()
    assert not any(module.training for module in reward.modules())


def test_nan_in_one_image_is_nan_in_its_score_alone(reward):
    pixels = images()
    clean = reward(pixels, TEXTS)
    pixels[1, 0, 3, 3] = float("nan")
    spoilt = reward(pixels, TEXTS)
    assert spoilt[1].isnan()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_float32_and_near_under_autocast_and_with_weights_in_bfloat16(model, reward, dtype):
    other = model.load(dtype=dtype)
    assert {p.dtype for p in other.encoder.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = other(images(), TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(scores, reward(images(), TEXTS), rtol=0, atol=0.1)
        assert not torch.equal(scores, reward(images(), TEXTS))


def test_the_head_computes_in_float32_under_autocast(reward):
    features = torch.randn(4, reward.encoder.num_features, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.head(features)
    assert torch.equal(scores, reward.head(features))


def test_the_constructor_reads_no_weights_and_load_reads_them_once(model):
    reward = model.reward(str(model.head), str(model.whole))
    assert list(reward.parameters()) == []
    reward.load()
    encoder = reward.encoder
    reward.load()
    assert reward.encoder is encoder
    assert not any(tensor.is_meta for tensor in [*reward.parameters(), *reward.buffers()])


def test_the_head_is_found_in_its_folder(published):
    for name in ("improved", "v2.5"):
        found = published[name]._replace(head=published[name].head.parent).load()
        assert torch.equal(found(images(), TEXTS), published[name].load()(images(), TEXTS))


@pytest.mark.parametrize(
    ("model", "head", "differences"),
    [
        (
            "improved",
            "v2.5",
            r"10 missing, first layers\.0\.bias, layers\.0\.weight, layers\.2\.bias; "
            r"10 unexpected, first scoring_head\.0\.bias, scoring_head\.0\.weight, scoring_head\.2\.bias",
        ),
        (
            "v2.5",
            "improved",
            r"10 missing, first scoring_head\.0\.bias, .*; 10 unexpected, first layers\.0\.bias, .*",
        ),
        ("v2.5", "linear", r"10 missing, first scoring_head\.0\.bias, .*; 2 unexpected, first bias, weight"),
    ],
    indirect=["model"],
)
def test_another_classs_head_is_refused_by_name(model, published, head, differences):
    reward = model.reward(str(published[head].head), str(model.whole))
    name = re.escape(published[head].head.name)
    with pytest.raises(ValueError, match=rf"{name} is not the weight file of Head \({differences}\): give the file"):
        reward.load()


def test_a_head_for_features_of_another_length_is_refused(model, tmp_path):
    """As with another CLIP than ViT-L/14."""
    state = torch.load(model.head)
    first = next(name for name in state if name.endswith("weight"))
    state[first] = state[first][:, 1:]
    with pytest.raises(ValueError, match=r"1 of another shape, first \S*weight\)"):
        model._replace(head=write(state, tmp_path / "head.pth")).load()


def test_a_head_with_a_layer_more_is_refused(model, tmp_path):
    state = torch.load(model.head) | {"extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected, first (layers\.0\.)?extra\.weight\)"):
        model._replace(head=write(state, tmp_path / "head.pth")).load()


def test_another_kind_of_image_encoder_is_refused_before_anything_is_read(published):
    on_clip, on_siglip = published["linear"], published["v2.5"]
    with pytest.raises(ValueError, match=r"is of type siglip, LaionAesthetic needs clip or clip_vision_model: leave"):
        LaionAesthetic(str(on_clip.head), str(on_siglip.whole))
    with pytest.raises(ValueError, match=r"is of type clip, AestheticV25 needs siglip or siglip_vision_model: leave"):
        AestheticV25(str(on_siglip.head), str(on_clip.whole))


def test_an_encoder_whose_weights_are_not_its_configurations_is_refused(model, tmp_path):
    state = load_file(model.whole / "model.safetensors")
    state["vision_model.extra"] = state.pop("vision_model.post_layernorm.bias")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model.whole / "config.json").read_bytes())
    with pytest.raises(
        ValueError,
        match=r"1 missing, first vision_model\.post_layernorm\.bias; 1 unexpected, first vision_model\.extra\)",
    ):
        model.load(pretrained=str(tmp_path))


def test_a_damaged_encoder_is_refused_with_the_cure(model, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((model.whole / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "config.json").write_bytes((model.whole / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be read .*copy or download"):
        model.load(pretrained=str(tmp_path))


def test_missing_files_are_refused_by_the_constructor(model, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model"):
        model.reward(str(model.head), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model"):
        model.reward(str(tmp_path / "nowhere.pth"), str(model.whole))
    with pytest.raises(ValueError, match=rf"{re.escape(model.reward.head_file)} is missing"):
        model.reward(str(tmp_path), str(model.whole))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"})[:-1])
    with pytest.raises(ValueError, match=r"cannot be read .*copy or download"):
        model.reward(str(model.head), str(tmp_path))
