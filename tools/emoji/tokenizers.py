"""Two small tokenizers whose vocabulary is the captions: byte-level BPE for CLIP, words and letters for T5."""

import json
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

MAX_TOKENS = 16  # of a prompt: both text encoders read exactly so many, padding included

LETTER_SCORE, WORD_SCORE = -12.0, -8.0  # log-probabilities: one word beats any way to spell it


def words_of(captions: list[str]) -> list[str]:
    """All words of the captions without punctuation, lower case, sorted."""
    return sorted({word.strip(".,").lower() for caption in captions for word in caption.split()} - {""})


def new_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learnt from the captions; any other text falls apart into bytes."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Each letter also ends a word: else an unknown last letter would have no token.
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator([caption.lower() for caption in captions], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def new_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """T5's unigram tokenizer: one token for each word of the captions, one for each printable ASCII character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("\u2581" + word, WORD_SCORE) for word in words_of(captions)]
    known = {piece for piece, _ in pieces}
    letters = ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    pieces += [(letter, LETTER_SCORE) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=MAX_TOKENS)
