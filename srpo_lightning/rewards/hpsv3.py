"""HPSv3 (arXiv 2508.03789): a human preference score by a vision-language model.

The score is mu of `(mu, log sigma) = MLP(h)`, h the hidden state of Qwen2-VL at the token `<|Reward|>`.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from srpo_lightning.files.pretrained import load_exactly, read_json, read_weights, unreadable_is_refused, weights_file
from srpo_lightning.rewards.base import Images, Reward, Scores, check_columns, check_lengths
from srpo_lightning.rewards.pixels import Preprocessing
from srpo_lightning.rewards.words import PUBLISHED
from srpo_lightning.training.nf4 import check_bitsandbytes, keep_in_4_bits

FILENAME = "HPSv3.safetensors"
NUM_PIXELS = 256 * 28 * 28  # about as many as an image is resized to
MAX_ASPECT_RATIO = 200
IMAGE_TOKEN = "<|image_pad|>"
REWARD_TOKEN = "<|Reward|>"
HEAD = "rm_head."
UNUSED = "lm_head.weight"  # what Qwen2-VL writes text with

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


class HPSv3(Reward):
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

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2-VL-7B-Instruct",
        weights: str = "MizzenAI/HPSv3",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        gradient_checkpointing: bool = False,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__()
        kind = read_json(pretrained, "", "config.json").get("model_type")
        if kind != "qwen2_vl":
            raise ValueError(
                f"{pretrained} is of type {kind}, HPSv3 needs qwen2_vl: leave out `pretrained`, or give a copy of "
                "Qwen/Qwen2-VL-7B-Instruct"
            )
        if Path(weights).expanduser().exists() or weights.count("/") != 1:  # a hub id has one
            weights_file(weights, FILENAME)
        if quantize == "nf4":
            check_bitsandbytes()
        self.pretrained = pretrained
        self.weights = weights
        self.dtype = getattr(torch, dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.quantize = quantize
        self.network: Network | None = None

    def load(self) -> None:
        """Read tokenizer and weights, once; at no time is there a second copy of the weights."""
        if self.network is not None:
            return
        with unreadable_is_refused(self.pretrained):
            self.tokenizer = transformers.Qwen2Tokenizer.from_pretrained(self.pretrained)
            config = transformers.Qwen2VLConfig.from_pretrained(self.pretrained)
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.image_id, self.reward_id = self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, REWARD_TOKEN])
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = read_json(self.pretrained, "", "chat_template.json")["chat_template"]
        config.text_config.vocab_size = len(self.tokenizer)
        from accelerate import init_empty_weights  # takes long to import

        with init_empty_weights(include_buffers=False):
            network = Network(config)
        network.to(torch.bfloat16)  # the rotary frequencies: the model was trained with rounded ones
        path = weights_file(self.weights, FILENAME)
        state = read_weights(path)
        state.pop(UNUSED, None)
        for name, tensor in state.items():
            state[name] = tensor.to(torch.float32 if name.startswith(HEAD) else self.dtype)
        load_exactly(network, state, path)
        del state
        if self.quantize == "nf4":
            keep_in_4_bits(network.model.layers)
        if self.gradient_checkpointing:
            # transformers' own switch works in training mode only, which a reward never enters.
            for layer in (*network.visual.blocks, *network.model.layers):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.network = network.eval().requires_grad_(False)

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
        patch, merged = config.patch_size, config.spatial_merge_size
        height, width = smart_resize(images.shape[-2], images.shape[-1], patch * merged)
        pixels = Preprocessing((height, width), "squash")(images)
        grid = torch.tensor([[1, height // patch, width // patch]] * len(images), device=images.device)
        patches = to_patches(pixels, patch, merged, config.temporal_patch_size)
        features: Tensor = self.network.visual(patches, grid_thw=grid).pooler_output
        return features.unflatten(0, (len(images), -1))

    def tokenize(self, text: str, num_image_tokens: int) -> list[int]:
        """Token ids of the whole conversation: image, instruction and text, and the question that is answered."""
        words = INSTRUCTION.format(text_prompt=text) + QUESTION
        conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
        prompt: str = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_image_tokens, 1)).input_ids
        return ids

    def _judge(self, features: Float[Tensor, "B N D"], texts: Sequence[str]) -> Float[Tensor, "B 2"]:
        # Padded on the right, where causal attention never looks: it takes no mask to keep padding out of a score.
        assert self.network is not None, "load() comes first"
        rows = [self.tokenize(text, features.shape[1]) for text in texts]
        first = rows[0].index(self.image_id)  # the same in all
        reward = [len(row) - 1 - row[::-1].index(self.reward_id) for row in rows]
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.reward_id)
        embeds = self.network.model.embed_tokens(tokens.to(features.device))
        parts = embeds[:, :first], features.to(embeds.dtype), embeds[:, first + features.shape[1] :]
        hidden = self.network.model(inputs_embeds=torch.cat(parts, dim=1), use_cache=False).last_hidden_state
        at_reward = hidden[torch.arange(len(rows)), reward]
        with torch.autocast(hidden.device.type, enabled=False):
            outputs: Tensor = self.network.rm_head(at_reward.to(self.network.rm_head[0].weight.dtype))
        return outputs


class Network(nn.Module):
    """HPSv3 by the names of its published file, with Qwen2-VL's language head left out."""

    def __init__(self, config: "transformers.Qwen2VLConfig") -> None:
        super().__init__()
        qwen = transformers.Qwen2VLModel(config)
        self.visual = qwen.visual
        self.model = qwen.language_model
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )


def smart_resize(height: int, width: int, factor: int, num_pixels: int = NUM_PIXELS) -> tuple[int, int]:
    """The size that an image is resized to: multiples of `factor`, about `num_pixels` in all.

    Sides are rounded to the nearest multiples where these have `num_pixels`. Otherwise they are scaled to it, and
    rounded up if the image is too small, down if it is too large.

    Raises:
        ValueError: if one side is more than 200 times the other.

    Source: package hpsv3 1.0.0, `dataset/utils.py`.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"images are {height} x {width}: HPSv3 takes sides up to {MAX_ASPECT_RATIO} to 1, crop them")
    rounded = [max(factor, round(side / factor) * factor) for side in (height, width)]
    # Multiplied or divided as there: one bit is a whole row of tokens.
    if math.prod(rounded) > num_pixels:
        scale = math.sqrt(height * width / num_pixels)
        rounded = [math.floor(side / scale / factor) * factor for side in (height, width)]
    elif math.prod(rounded) < num_pixels:
        scale = math.sqrt(num_pixels / (height * width))
        rounded = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def to_patches(pixels: Images, patch: int, merged: int, num_frames: int) -> Float[Tensor, "P V"]:
    """Qwen2-VL's input: an image's patches, each repeated as the frames of a film, by squares of `merged` x `merged`.

    Source: transformers, `image_processing_qwen2_vl.py`.
    """
    squares = pixels.unflatten(3, (-1, merged, patch)).unflatten(2, (-1, merged, patch))
    # Image, square (row, column), patch in it (row, column), channel, frame, pixel in it (row, column).
    squares = squares.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    return squares.expand(*squares.shape[:6], num_frames, patch, patch).flatten(5).flatten(0, 4)
