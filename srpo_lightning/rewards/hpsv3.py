"""HPSv3 (arXiv 2508.03789): a human preference score by a vision-language model.

The score is mu of `(mu, log sigma) = MLP(h)`, h the hidden state of Qwen2-VL at the token `<|Reward|>`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srpo_lightning.files.pretrained import read_weights, weights_file
from srpo_lightning.rewards.base import Images, Scores, check_columns, check_lengths
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.qwen2_vl import Qwen2VLReward, smart_resize
from srpo_lightning.rewards.words import PUBLISHED

FILENAME = "HPSv3.safetensors"
NUM_PIXELS = 256 * 28 * 28  # about as many as an image is resized to
IMAGE_TOKEN = "<|image_pad|>"
REWARD_TOKEN = "<|Reward|>"

# Word for word from the package hpsv3 1.0.0, hpsv3/dataset/data_collator_qwen.py; MIT License, Copyright (c) 2024 HPSv3
# Team. The model was trained under this text.
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall \
score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 \
being the best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as \
abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to \
interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements \
(e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, \
composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of \
harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or \
adult material. If such content is present, the image quality and satisfaction score should be the lowest \
possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align \
with the textual description. The subject should match the description in terms of number, appearance, and \
behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the \
image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image \
logically fit the scenario described in the prompt. The environment should support and enhance the subject \
without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, \
accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, \
but critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the \
image. The generated content should not introduce elements that conflict with or distort the original \
description.
Textual prompt - {text_prompt}


"""
QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"


class HPSv3(Qwen2VLReward):
    """HPSv3: Qwen2-VL-7B, asked to rate an image under its prompt; FLUX.1-dev scores 10.4 in its own benchmark.

    A head reads mean and standard deviation of the preference from the hidden state at the token `<|Reward|>`. The
    score is the mean. Differences of scores count (Bradley-Terry): they have no bounds.

    As in the published package: the size that images are resized to, the prompt and its tokens, and rotary frequencies
    rounded to bfloat16. Each token of image or text has one position: Qwen2-VL is given embeddings alone there, so that
    it cannot count rows and columns. Not as there: resized images are not rounded to 8 bits, and in bfloat16 the vision
    tower's angles are rounded once less. If a prompt holds `<|Reward|>` itself, the last one is read.

    Source: arXiv 2508.03789; package hpsv3 1.0.0, `inference.py` and `model/qwen2vl_trainer.py`.

    Args:
        pretrained: Folder or hub id of Qwen2-VL-7B-Instruct, for configuration, tokenizer and chat template; its
            weights are not read.
        weights: Published file, a folder that holds it, or the hub id.
        dtype: Precision of the weights, 15.5 GB in bfloat16; the head's are float32 either way.
        gradient_checkpointing: Whether the backward pass computes each layer again, instead of storing it.
        quantize: Quantization of the language model's linear layers. nf4 rounds them to 4 bits while loading, on a
            GPU where there is one: 6.1 GB in all, and not quite the published scores. It needs the extra `quant`.
    """

    word_lists = PUBLISHED
    base_model = "Qwen/Qwen2-VL-7B-Instruct"
    vision_token = IMAGE_TOKEN
    reward_tokens = (REWARD_TOKEN,)

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2-VL-7B-Instruct",
        weights: str = "MizzenAI/HPSv3",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        gradient_checkpointing: bool = False,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__(pretrained, weights, dtype, gradient_checkpointing, quantize)
        if Path(weights).expanduser().exists() or weights.count("/") != 1:  # a hub id has one
            weights_file(weights, FILENAME)

    def new_head(self, width: int) -> nn.Module:
        """Mu and log sigma of a hidden state."""
        return nn.Sequential(
            nn.Linear(width, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def read_state(self) -> tuple[dict[str, Tensor], Path]:
        """The published file, whose names are Network's."""
        path = weights_file(self.weights, FILENAME)
        return read_weights(path), path

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The mean of each image's preference under its text."""
        return self.preference(images, texts)[0]

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """Each image goes through the vision tower once; the language model takes one column of texts after another."""
        check_columns(images, texts)
        features = self.image_features(images)
        columns = [self._judge(features, column)[:, 0] for column in texts]
        return torch.stack(columns, dim=1).to(torch.promote_types(torch.float32, images.dtype))

    def preference(self, images: Images, texts: Sequence[str]) -> tuple[Scores, Scores]:
        """Mean and standard deviation, mu and sigma, of each image's preference under its text.

        The package returns the logarithm of sigma; its training loss takes the exponential, as here.
        """
        check_lengths(images, texts)
        outputs = self._judge(self.image_features(images), texts)
        mu, log_sigma = outputs.to(torch.promote_types(torch.float32, images.dtype)).unbind(1)
        return mu, log_sigma.exp()

    def image_features(self, images: Images) -> Float[Tensor, "B N D"]:
        """What stands for each image in the language model, at its N tokens; about 256."""
        assert self.network is not None, "load() comes first"
        config = self.network.visual.config
        side = config.patch_size * config.spatial_merge_size
        height, width = images.shape[-2:]
        pixels = Preprocessing(smart_resize(height, width, side, NUM_PIXELS, NUM_PIXELS), "squash")(images)
        return self.features_of(pixels.unsqueeze(2).expand(-1, -1, config.temporal_patch_size, -1, -1))

    def tokenize(self, text: str, num_image_tokens: int) -> list[int]:
        """Token ids of the whole conversation: image, instruction and text, and the question that is answered."""
        return self.conversation("image", INSTRUCTION.format(text_prompt=text) + QUESTION, num_image_tokens)

    def _judge(self, features: Float[Tensor, "B N D"], texts: Sequence[str]) -> Float[Tensor, "B 2"]:
        rows = [self.tokenize(text, features.shape[1]) for text in texts]
        (reward_id,) = self.reward_ids
        return self.answers(features, rows, [[len(row) - 1 - row[::-1].index(reward_id)] for row in rows])[:, 0]
