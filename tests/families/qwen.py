"""Tokenizer, language models and VAE of Qwen's families, small and with random weights."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Of Qwen3: one that is not to think is given an empty thought."""


def tokenizer(max_tokens: int, *texts: str) -> Qwen2Tokenizer:
    """Of bytes, and of every word in `texts`, in the templates' names of turns too."""
    bytes_of = pre_tokenizers.ByteLevel
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            bytes_of(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(bytes_of.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    words = [word for text in ("user\nassistant\n", *texts) for word in _without_special(text)]
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    found = Qwen2Tokenizer(
        vocab=model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL)},
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=max_tokens,
    )
    found.chat_template = CHAT
    return found


def _without_special(text: str) -> Iterable[str]:
    for token in SPECIAL:
        text = text.replace(token, "\0")
    return text.split("\0")


LANGUAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def qwen3(num_tokens: int, num_layers: int) -> Qwen3Model:
    return noisy(Qwen3Model(Qwen3Config(vocab_size=num_tokens, num_hidden_layers=num_layers, **LANGUAGE)))


def qwen3_vl(num_tokens: int, num_layers: int) -> Qwen3VLModel:
    text = {"vocab_size": num_tokens, "num_hidden_layers": num_layers, "rope_parameters": ROPE, **LANGUAGE}
    vision = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    return noisy(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)))


def qwen2_5_vl(num_tokens: int, num_layers: int) -> Qwen2_5_VLForConditionalGeneration:
    sizes = {name: value for name, value in LANGUAGE.items() if name != "head_dim"}
    text = {"vocab_size": num_tokens, "num_hidden_layers": num_layers, "rope_parameters": ROPE, **sizes}
    vision = VISION | {"fullatt_block_indexes": [0]}
    return noisy(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


def video_vae() -> AutoencoderKLQwenImage:
    mean, std = [0.3, -0.5, 0.1, 1.2], [0.7, 2.5, 1.3, 0.4]
    return noisy(AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=mean, latents_std=std))


def noisy(model: nn.Module, deviation: float = 0.1) -> Any:
    """With noise on all weights, norms and zeros too, so that none of them can be left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=deviation)
    return model.eval()
