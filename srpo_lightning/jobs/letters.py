"""Tokenizers that know letters alone, in the place of those that come with published models."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast, TokenizersBackend

LETTERS = [chr(number) for number in range(33, 127)]
START, END, TURN, TURN_END = "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip(max_tokens: int) -> CLIPTokenizer:
    """Of a CLIP's text tower."""
    tokens = ["<|startoftext|>", END, *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_tokens)


def t5(max_tokens: int) -> T5TokenizerFast:
    """Of a T5."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=max_tokens)


def qwen2(max_tokens: int) -> Qwen2Tokenizer:
    """Of a Qwen, by bytes, with marks of turns."""
    special = [END, TURN, TURN_END]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    found = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=special[1:],
        model_max_length=max_tokens,
    )
    found.chat_template = CHAT
    return found


def backend(max_tokens: int) -> TokenizersBackend:
    """Of a Mistral, by bytes, likewise."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), START, END]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return TokenizersBackend(
        tokenizer_object=made,
        bos_token=START,
        pad_token=END,
        additional_special_tokens=[TURN, TURN_END],
        model_max_length=max_tokens,
        chat_template=CHAT,
    )


BY_CLASS: dict[str, Any] = {
    "CLIPTokenizer": clip,
    "T5TokenizerFast": t5,
    "Qwen2Tokenizer": qwen2,
    "TokenizersBackend": backend,
}
"""What makes a tokenizer of each class, for so many tokens at most."""
