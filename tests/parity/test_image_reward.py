"""ImageReward against the package that its authors publish, from the weight file that the package itself writes."""

from typing import NamedTuple

import pytest
import torch

from srpo_lightning.rewards import image_reward
from srpo_lightning.rewards.image_reward import ImageReward
from srpo_lightning.rewards.pixels import CLIP_STD, Preprocessing
from tests.parity import originals

# Square, wide, tall, odd; 3 and 7 pixels to cut, half of which is rounded to even; smaller than what the model reads.
SIZES = [(224, 224), (448, 448), (320, 640), (512, 384), (224, 227), (231, 224), (301, 303), (1024, 227), (96, 130)]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-!?'()[]_/\u03c3\u03c2\u00df\u00f8\u4e2d\u6587\u2014\u2019\u05d0"
PIECES = ["cat", "photo", "the", "##ing", "\U0001f431", "\u2615"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + c for c in CHARACTERS), *PIECES]
TEXTS = [
    "",
    "  ",
    "a photo of the cat",
    "RUNNING cats, don't stop (now) [x] a_b/c!",
    "caf\u00e9 \u00d1and\u00fa e\u0301 \u0130stanbul stra\u00dfe \u1e9e",
    "\u03a3\u0391\u03a3 \u4e2d\u6587cat \u05d0\u05b8 \uff46ull \ufb01ne",
    "\U0001f431 cat\U0001f431 \u2615\ufe0f \U0001f469\u200d\U0001f680",
    "tab\there\nnew\u00a0line\u200bzero\u00ad\x00nul \u2014 it\u2019s",
    "[DEC] a [ENC]cat [SEP] [MASK][PAD] [dec] [ SEP ]",
    "a" * 150 + " cat",
    "the cat " * 40,
]
HIDDEN_SIZE = 768  # the original's head is for no other
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(VOCABULARY) + 2,
    "encoder_width": HIDDEN_SIZE,
    "add_cross_attention": True,
}
VIT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def picture(height: int, width: int) -> torch.Tensor:
    """8-bit values with detail but no noise, like a photograph's; PIL clamps twice: leave it room."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([x.sin() * y.cos(), (x + y + height).sin(), (x * y).cos()], dim=-1)
    return ((waves * 0.35 + 0.5) * 255).round().byte()


def images(height: int, width: int) -> torch.Tensor:
    return picture(height, width).permute(2, 0, 1)[None] / 255


class Both(NamedTuple):
    reward: ImageReward
    original: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    bert = folder / "bert-base-uncased"  # where the original looks for it
    bert.mkdir()
    (bert / "tokenizer_config.json").write_text("{}")
    (bert / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    preprocess = Preprocessing((224, 224), half_even=True)
    original = originals.run(
        "image_reward",
        folder,
        vit=(VIT["hidden_size"], VIT["num_hidden_layers"], VIT["num_attention_heads"]),
        med_config=MED_CONFIG,
        texts=TEXTS,
        pictures=[picture(*size) for size in SIZES],
        pixels=torch.cat([preprocess(images(*size)) for size in SIZES]),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VIT.items():
            patch.setitem(image_reward.VIT_LARGE, name, value)
        reward = ImageReward(str(folder), str(bert))
        reward.load()
    return Both(reward, original)


def test_tokens_equal_the_originals(both):
    """Lower case, accents, control characters, special tokens as text, 150 letters, more than 35 tokens."""
    tokens = both.reward.tokenize(TEXTS)
    assert torch.equal(tokens.input_ids, both.original["input_ids"])
    assert torch.equal(tokens.attention_mask, both.original["attention_mask"])
    assert tokens.input_ids.shape == (len(TEXTS), 35)
    assert len({tuple(row) for row in tokens.input_ids.tolist()}) == len(TEXTS) - 1  # blank is empty


def test_pixels_equal_the_originals_to_the_rounding_of_8_bits(both):
    """torchvision on PIL pictures. PIL rounds twice, and the second pass weighs the first one's error by up to 1.25."""
    for size, theirs in zip(SIZES, both.original["pixels"], strict=True):
        difference = (both.reward.preprocess(images(*size))[0] - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1)
        assert difference.max() <= (1e-6 if min(size) == 224 else 1.125 / 255), size


def test_scores_of_the_same_pixels_equal_the_originals(both):
    """score_gard, for every picture and text."""
    with torch.no_grad():
        ours = torch.cat([both.reward.compare(images(*size), TEXTS) for size in SIZES])
    theirs = both.original["from_pixels"]
    assert theirs.std(0).min() > 0.01
    assert theirs.std(1).min() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_scores_of_pictures_equal_the_originals(both):
    """score: closely where PIL resizes nothing, else as near as its rounding to 8 bits allows."""
    for size, theirs in zip(SIZES, both.original["scores"], strict=True):
        with torch.no_grad():
            ours = both.reward.compare(images(*size), TEXTS)[0]
        tolerance = 1e-5 if min(size) == 224 else 1e-2
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=tolerance, msg=lambda text, size=size: f"{size} {text}"
        )
