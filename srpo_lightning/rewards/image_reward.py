"""ImageReward (arXiv 2304.05977): how well people find that an image shows its text, and how good it looks.

The score is `(MLP(h) - mean) / std`, h the text encoder's state of the first token, which attends to the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from srpo_lightning.files.pretrained import (
    load_exactly,
    part,
    read_by,
    read_json,
    read_weights,
    weights_file,
)
from srpo_lightning.rewards.aesthetic import HIDDEN, Head
from srpo_lightning.rewards.base import Images, Reading, Reward, Scores, check_columns
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.words import PUBLISHED

VIT_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
# What med_config.json says of the text encoder. It names another image encoder's width, which its authors overwrite.
FROM_CONFIG = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "pad_token_id",
    "hidden_act",
    "layer_norm_eps",
)
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # published with the weights

# BLIP's heads for its own training, and a constant.
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}
RENAMED = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "norm.": "post_layernorm.",
}


class ImageRewardModel(nn.Module):
    """BLIP's image encoder, its text encoder, which attends to the image, and a head on the text's first token."""

    def __init__(self, config: "transformers.BertConfig") -> None:
        super().__init__()
        text = transformers.BlipTextConfig(
            **{name: getattr(config, name) for name in FROM_CONFIG},
            is_decoder=True,  # which is how it gets its cross-attention; it attends both ways
            encoder_hidden_size=VIT_LARGE["hidden_size"],
        )
        self.visual_encoder = transformers.BlipVisionModel(
            transformers.BlipVisionConfig(**VIT_LARGE, layer_norm_eps=1e-6)
        )
        self.text_encoder = transformers.BlipTextModel(text, add_pooling_layer=False)
        self.mlp = Head((text.hidden_size, *HIDDEN, 1), (0, 2, 4, 6, 7))


class ImageReward(Reward):
    """ImageReward v1.0: about -2 to 2, by the published mean and deviation.

    Source: arXiv 2304.05977; model THUDM/ImageReward; zai-org/ImageReward:ImageReward/ImageReward.py.

    Args:
        pretrained: Folder or hub id with ImageReward.pt and med_config.json, or the former's path beside the latter.
        tokenizer: Folder or hub id of bert-base-uncased.
        dtype: Precision of all weights but the head's, which computes in float32 either way.
    """

    word_lists = PUBLISHED
    max_tokens = MAX_TOKENS

    def __init__(
        self,
        pretrained: str = "THUDM/ImageReward",
        tokenizer: str = "bert-base-uncased",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        path = Path(pretrained).expanduser()
        folder = str(path.parent) if path.is_file() else pretrained
        self.config = transformers.BertConfig.from_dict(read_json(folder, "", "med_config.json"))
        part(tokenizer, "", "tokenizer_config.json")
        self.tokenizer = read_by(transformers.BertTokenizer, tokenizer)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
        if len(self.tokenizer) != self.config.vocab_size:
            raise ValueError(
                f"{tokenizer} has {len(self.tokenizer)} tokens with [DEC] and [ENC], the text encoder "
                f"{self.config.vocab_size}: give bert-base-uncased, whole"
            )
        self.pretrained = pretrained
        self.dtype = getattr(torch, dtype)
        self.preprocess = Preprocessing((VIT_LARGE["image_size"],) * 2, half_even=True)
        self.model: ImageRewardModel | None = None

    def load(self) -> None:
        """Read the weights, once."""
        if self.model is not None:
            return
        path = weights_file(self.pretrained, "ImageReward.pt")
        from accelerate import init_empty_weights  # takes long to import

        with init_empty_weights(include_buffers=False):
            model = ImageRewardModel(self.config)
        load_exactly(model, dict(renamed(read_weights(path), self.dtype)), path)
        self.model = model.eval().requires_grad_(False)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The score of each image under its own text."""
        return self.scores(images, [texts])[:, 0]

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """Each image goes through the image encoder once; the text encoder looks at it anew for each text."""
        check_columns(images, texts)
        assert self.model is not None, "load() comes first"
        pixels = self.preprocess(images)
        patches = self.model.visual_encoder(pixel_values=pixels).last_hidden_state
        columns = []
        for column in texts:
            tokens = self.tokenize(column).to(images.device)
            states = self.model.text_encoder(**tokens, encoder_hidden_states=patches).last_hidden_state
            columns.append(self.model.mlp(states[:, 0].to(pixels.dtype)))
        return (torch.stack(columns, dim=1) - MEAN) / STD

    def reading(self, text: str) -> Reading:
        """The tokens, and whether there are more."""
        kept = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids
        return Reading(tuple(kept), len(self.tokenizer(text).input_ids) > MAX_TOKENS)

    def tokenize(self, texts: Sequence[str]) -> "transformers.BatchEncoding":
        """Token ids and attention mask, [B, 35] each."""
        return self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_token_type_ids=False,
            return_tensors="pt",
        )


def renamed(state: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names of ImageReward.pt as ImageRewardModel has them; `dtype` is BLIP's, the head keeps its own."""
    for name, tensor in state.items():
        if name in UNUSED:
            continue
        encoder, dot, own = name.removeprefix("blip.").partition(".")
        if encoder == "visual_encoder":
            for theirs, ours in RENAMED.items():
                own = own.replace(theirs, ours)
        yield encoder + dot + own, tensor if encoder == "mlp" else tensor.to(dtype)
