"""Reward models that are a Qwen2-VL with a head: its files, its pixels, and what it makes of a conversation."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from srpo_lightning.files.pretrained import load_exactly, read_by, read_json
from srpo_lightning.rewards.base import Reward
from srpo_lightning.training.nf4 import check_bitsandbytes, keep_in_4_bits

MAX_ASPECT_RATIO = 200
HEAD = "rm_head."
UNUSED = "lm_head.weight"  # what Qwen2-VL writes text with


class Network(nn.Module):
    """A Qwen2-VL by the names of its first published files, with a head in the place of the language head.

    Args:
        config: Configuration of the Qwen2-VL.
        head: Module that reads a hidden state.
    """

    def __init__(self, config: "transformers.Qwen2VLConfig", head: nn.Module) -> None:
        super().__init__()
        qwen = transformers.Qwen2VLModel(config)
        self.visual = qwen.visual
        self.model = qwen.language_model
        self.rm_head = head


class Qwen2VLReward(Reward):
    """A Qwen2-VL that is asked in words, and whose answer a head reads at special tokens.

    Each token of picture or text has one position: the published models are given embeddings alone, so that they cannot
    count rows and columns. Their rotary frequencies are rounded to bfloat16, as in training.
    """

    base_model: ClassVar[str]
    """Hub id of the Qwen2-VL that the model was made from."""

    vision_token: ClassVar[str]
    """Token that stands for a patch of what is rated."""

    reward_tokens: ClassVar[tuple[str, ...]]
    """Tokens that were added to the vocabulary, where the head reads."""

    def __init__(self, pretrained: str, weights: str, dtype: str, gradient_checkpointing: bool, quantize: str) -> None:
        super().__init__()
        kind = read_json(pretrained, "", "config.json").get("model_type")
        if kind != "qwen2_vl":
            raise ValueError(
                f"{pretrained} is of type {kind}, {type(self).__name__} needs qwen2_vl: leave out `pretrained`, or "
                f"give a copy of {self.base_model}"
            )
        if quantize == "nf4":
            check_bitsandbytes()
        self.pretrained = pretrained
        self.weights = weights
        self.dtype = getattr(torch, dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.quantize = quantize
        self.network: Network | None = None

    @abstractmethod
    def new_head(self, width: int) -> nn.Module:
        """What reads a hidden state of `width` numbers; made without memory."""

    @abstractmethod
    def read_state(self) -> tuple[dict[str, Tensor], Path]:
        """Tensors by the names of Network, and the file that they are of; UNUSED may be among them."""

    def load(self) -> None:
        """Read tokenizer and weights, once; at no time is there a second copy of the weights."""
        if self.network is not None:
            return
        self.tokenizer = read_by(transformers.Qwen2Tokenizer, self.pretrained)
        config = read_by(transformers.Qwen2VLConfig, self.pretrained)
        self.tokenizer.add_tokens(list(self.reward_tokens), special_tokens=True)
        self.vision_id, *self.reward_ids = self.tokenizer.convert_tokens_to_ids(
            [self.vision_token, *self.reward_tokens]
        )
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = read_json(self.pretrained, "", "chat_template.json")["chat_template"]
        config.text_config.vocab_size = len(self.tokenizer)
        from accelerate import init_empty_weights  # takes long to import

        with init_empty_weights(include_buffers=False):
            network = Network(config, self.new_head(config.text_config.hidden_size))
        network.to(torch.bfloat16)  # the rotary frequencies: the model was trained with rounded ones
        state, path = self.read_state()
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

    def conversation(self, kind: str, words: str, num_vision_tokens: int) -> list[int]:
        """Token ids of one turn, of what is rated and of words, up to where the answer would begin.

        Args:
            kind: image or video, as the chat template calls them.
            words: Words of the turn.
            num_vision_tokens: Tokens that stand for what is rated.
        """
        turn = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": words}]}]
        prompt: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        placed = prompt.replace(self.vision_token, self.vision_token * num_vision_tokens, 1)
        ids: list[int] = self.tokenizer(placed).input_ids
        return ids

    def features_of(self, clips: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B N D"]:
        """What stands for each clip in the language model, at its N tokens; preprocessed, and of an even length."""
        assert self.network is not None, "load() comes first"
        config = self.network.visual.config
        patches = to_patches(clips, config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
        strides = (config.temporal_patch_size, config.patch_size, config.patch_size)
        counts = [side // stride for side, stride in zip(clips.shape[2:], strides, strict=True)]
        grid = torch.tensor([counts] * len(clips), device=clips.device)
        features: Tensor = self.network.visual(patches, grid_thw=grid).pooler_output
        return features.unflatten(0, (len(clips), -1))

    def answers(
        self, features: Float[Tensor, "B N D"], rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> Float[Tensor, "B R V"]:
        """What the head reads in each conversation.

        Args:
            features: What stands for each picture or clip.
            rows: Token ids of each conversation.
            places: R numbers of tokens of each, where the head reads.
        """
        # Padded on the right, where causal attention never looks: it takes no mask to keep padding out of a score.
        assert self.network is not None, "load() comes first"
        first = rows[0].index(self.vision_id)  # the same in all
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.reward_ids[0])
        embeds = self.network.model.embed_tokens(tokens.to(features.device))
        parts = embeds[:, :first], features.to(embeds.dtype), embeds[:, first + features.shape[1] :]
        hidden = self.network.model(inputs_embeds=torch.cat(parts, dim=1), use_cache=False).last_hidden_state
        read = hidden[torch.arange(len(rows))[:, None], torch.tensor(places)]
        with torch.autocast(hidden.device.type, enabled=False):
            outputs: Tensor = self.network.rm_head(read.to(next(self.network.rm_head.parameters()).dtype))
        return outputs


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that a picture is resized to: multiples of `factor`, with `min_pixels` to `max_pixels` in all, or about.

    Sides are rounded to the nearest multiples where these have so many. Otherwise they are scaled to the bound, and
    rounded up if the picture is too small, down if it is too large.

    Raises:
        ValueError: if one side is more than 200 times the other.

    Source: package hpsv3 1.0.0, `dataset/utils.py`; KwaiVGI/VideoAlign, `vision_process.py`.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"images are {height} x {width}: Qwen2-VL takes sides up to {MAX_ASPECT_RATIO} to 1, crop them"
        )
    rounded = [max(factor, round(side / factor) * factor) for side in (height, width)]
    # Multiplied or divided as there: one bit is a whole row of tokens.
    if math.prod(rounded) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rounded = [math.floor(side / scale / factor) * factor for side in (height, width)]
    elif math.prod(rounded) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def to_patches(clips: Float[Tensor, "B 3 F H W"], patch: int, merged: int, num_frames: int) -> Float[Tensor, "P V"]:
    """Qwen2-VL's input: patches of `num_frames` frames, one such group after the other, by squares of patches.

    Args:
        clips: Preprocessed clips; F is a multiple of `num_frames`, H and W are of `patch * merged`.
        patch: Side of a patch in pixels.
        merged: Side of a square in patches.
        num_frames: Frames of a patch.

    Source: transformers, `image_processing_qwen2_vl.py`.
    """
    squares = clips.unflatten(4, (-1, merged, patch)).unflatten(3, (-1, merged, patch)).unflatten(2, (-1, num_frames))
    # Clip, group of frames, square (row, column), patch in it (row, column); channel, frame, pixel in it (row, column).
    return squares.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9).flatten(6).flatten(0, 5)
