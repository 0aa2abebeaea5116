"""HPSv2 against the package hpsv2: its tokenizer, its transforms, its ViT and its score, on random weights."""

import json

import pytest
import torch
from transformers import CLIPTokenizer

from srpo_lightning.jobs.convert import convert
from srpo_lightning.rewards import HPSv2
from srpo_lightning.rewards.hps import SGPHPS
from tests.parity import originals

SIZES = [(28, 28), (64, 64), (45, 80), (80, 45), (61, 28), (20, 33)]
TEXTS = ["a cat", "Real. a photograph of an astronaut riding a horse on Mars, 4k", "Painting. " + "very " * 100]
AWKWARD = [
    "",
    "   ",
    "ünïcödé 日本語 العربية",
    "🐱🚀 family: 👨‍👩‍👧",
    "“curly” quotes — and an ellipsis…",
    "line\nbreak\ttab\u00a0space",
    "&lt;b&gt; &amp;amp; entities",
    "don't they'll we've I'm 12345 $%^",
    "\uff26\uff35\uff2c\uff2c \uff57\uff49\uff44\uff54\uff48 is full width",
    "schÃ¶n mojibake",
    "ends with <|endoftext|> in it",
    "İstanbul ẞ ǅ",
    "word " * 77,
    "a" * 300,
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h, w, 3), generator=draw, dtype=torch.uint8) for h, w in SIZES]
    folder = tmp_path_factory.mktemp("hpsv2")
    outputs = originals.run("hpsv2", folder, images=images, texts=TEXTS, awkward=AWKWARD)
    tokens = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {tokens.get(token, token): i for token, i in outputs["vocabulary"].items()}
    merges = [tuple(pair) for pair in outputs["merges"]]
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder / "processor")
    return outputs | {"images": images, "processor": str(folder / "processor")}


def load(original, kind=HPSv2, **settings):
    reward = kind(pretrained=original["weights"], processor=original["processor"], **settings)
    reward.load()
    return reward


def as_batch(image):
    return image.permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_scores_and_pixels_equal_the_originals(original, fit):
    reward = load(original, fit=fit)
    with torch.no_grad():
        scores = torch.cat([reward.compare(as_batch(image), TEXTS) for image in original["images"]])
    torch.testing.assert_close(scores, original["scores"][fit], rtol=1e-4, atol=1e-6)
    for image, theirs in zip(original["images"], original["pixels"][fit], strict=True):
        torch.testing.assert_close(reward.preprocess(as_batch(image))[0], theirs, rtol=0, atol=1e-4)


def test_tokens_equal_the_originals(original):
    reward = load(original)
    for text, theirs in zip(TEXTS + AWKWARD, original["tokens"].tolist(), strict=True):
        ours = reward.tokenize(text)
        assert ours + [0] * (77 - len(ours)) == theirs, text


def test_the_converted_folder_gives_the_same_scores(original, tmp_path):
    convert(original["weights"], str(tmp_path / "converted"), original["processor"])
    ours, converted = load(original), HPSv2(str(tmp_path / "converted"))
    converted.load()
    images = as_batch(original["images"][2])
    with torch.no_grad():
        # Not bit for bit: products round by where in memory the weights begin.
        ours, converted = (reward.compare(images, TEXTS + AWKWARD) for reward in (ours, converted))
    torch.testing.assert_close(converted, ours, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "converted" / "preprocessor_config.json").read_text())
    assert config["size"] == {"shortest_edge": 28}
    assert not list(tmp_path.glob("*.partial*"))
    with pytest.raises(ValueError, match="exists already: name another output"):
        convert(original["weights"], str(tmp_path / "converted"), original["processor"])


def test_a_wrong_file_is_refused_with_the_first_differences(original, tmp_path):
    state = torch.load(original["weights"], weights_only=True)["state_dict"]
    wrong = tmp_path / "wrong.pt"

    def refusal(content):
        torch.save(content, wrong)
        with pytest.raises(ValueError, match=r"give the|the published") as caught:
            HPSv2(str(wrong), processor=original["processor"]).load()
        return str(caught.value)

    renamed = {name.replace("ln_final", "final"): tensor for name, tensor in state.items()}
    missing = "2 missing, first text_model.final_layer_norm.bias, text_model.final_layer_norm.weight"
    assert f"{missing}; 2 unexpected, first final.bias, final.weight" in refusal({"state_dict": renamed})
    assert "1 of another shape, first logit_scale" in refusal(state | {"logit_scale": torch.ones(2)})
    assert "no open_clip vision transformer: missing visual.conv1.weight" in refusal({"layers.0.weight": torch.ones(2)})
    assert "holds no state dict" in refusal([1, 2])
    wrong.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"cannot be read.*download"):
        HPSv2(str(wrong), processor=original["processor"]).load()


def test_the_semantic_guided_score_is_the_softmax_of_two_hps(original):
    """By hand from the originals' scores would need its logit scale: from HPSv2's own scores here."""
    hps, sgp = load(original), load(original, SGPHPS)
    image, text = as_batch(original["images"][1]), TEXTS[0]
    with torch.no_grad():
        pair = hps.compare(image, [f"Realistic photo. {text}", f"CG Render. {text}"])
        expected = (pair * hps.clip.logit_scale.exp()).softmax(1)[:, 0]
        torch.testing.assert_close(sgp(image, [text]), expected)
        torch.testing.assert_close(sgp.compare(image, [text, TEXTS[1]])[:, 0], expected)
        difference = load(original, SGPHPS, as_probability=False)(image, [text])
        torch.testing.assert_close(difference, pair[:, 0] - pair[:, 1], rtol=1e-5, atol=1e-6)
    assert 0 < expected < 1
    assert abs(expected - 0.5) > 1e-4
