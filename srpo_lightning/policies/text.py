"""FLUX.1's text features: T5's sequence and CLIP's pooled vector, as diffusers' FluxPipeline computes them."""

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_lightning.errors import naming
from srpo_lightning.files.fingerprint import ends
from srpo_lightning.files.pretrained import load_whole, part, read_json, unreadable_is_refused
from srpo_lightning.training.devices import check_device
from srpo_lightning.training.nf4 import check_bitsandbytes, keep_in_4_bits, keep_in_8_bits

Quantize: TypeAlias = Literal["none", "int8", "nf4"]

MOST_TOKENS = 512
"""T5 tokens that FLUX reads of a prompt, as FluxPipeline has it."""

CLIP_IMAGES = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""What a folder may hold of a whole CLIP, which FLUX does not read."""


class TextFeatures(NamedTuple):
    """Features of one text: `prompt_embeds` [T, D] and `pooled_prompt_embeds` [P]."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


class FluxTextEncoder:
    """The two text encoders of a FLUX pipeline folder. Tokenizers load at once, weights on first use.

    Args:
        pretrained: a folder in the layout of diffusers' FluxPipeline, or a hub id.
        max_sequence_length: T5 tokens per prompt, padding included; the model attends to padding, so this is part of
            what it was trained on. None: what the T5 tokenizer states, at most 512.
        dtype: of the encoders and of the features.
        device: where the encoders run.
        quantize: int8 or nf4 keeps T5's linear layers in 8 or 4 bits per weight (T5-XXL in about 5 or 4 GB instead of
            9.5); its features differ from those of whole weights. Needs the extra `quant`.
    """

    def __init__(
        self,
        pretrained: str,
        max_sequence_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        quantize: Quantize = "none",
    ) -> None:
        if quantize != "none":
            check_bitsandbytes()
        if max_sequence_length is not None and max_sequence_length > MOST_TOKENS:
            raise ValueError(
                f"data.max_sequence_length is {max_sequence_length}: FLUX reads {MOST_TOKENS} tokens at most, set it "
                "to that or less"
            )
        with naming(f"data.text_device is {device}"):
            torch.device(device)
        part(pretrained, "text_encoder_2", "config.json")
        self.pretrained, self.dtype, self.device = pretrained, dtype, device
        self.quantize = quantize
        with unreadable_is_refused(pretrained):
            self.clip_tokenizer = CLIPTokenizer.from_pretrained(pretrained, subfolder="tokenizer")
            self.t5_tokenizer = T5TokenizerFast.from_pretrained(pretrained, subfolder="tokenizer_2")
        self.max_sequence_length = max_sequence_length or min(int(self.t5_tokenizer.model_max_length), MOST_TOKENS)
        self._encoders: tuple[CLIPTextModel, T5EncoderModel] | None = None

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """How many T5 tokens each prompt is, its end included; what exceeds `max_sequence_length` is cut off."""
        return [len(ids) for ids in self.t5_tokenizer(prompts).input_ids]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the features of one prompt, by name."""
        t5 = read_json(self.pretrained, "text_encoder_2", "config.json")
        clip = read_json(self.pretrained, "text_encoder", "config.json")
        return {
            "prompt_embeds": (self.max_sequence_length, t5["d_model"]),
            "pooled_prompt_embeds": (clip["hidden_size"],),
        }

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[TextFeatures]:
        """Features of each prompt, on the CPU."""
        clip, t5 = self._load()
        clip_ids = self._tokens(self.clip_tokenizer, prompts, self.clip_tokenizer.model_max_length)
        t5_ids = self._tokens(self.t5_tokenizer, prompts, self.max_sequence_length)
        pooled = clip(clip_ids).pooler_output.cpu()
        sequence = t5(t5_ids)[0].cpu()
        return [TextFeatures(s.clone(), p.clone()) for s, p in zip(sequence, pooled, strict=True)]

    def description(self) -> dict[str, str | int]:
        """What the features depend on, for people to read, and a `fingerprint` of all of it, files included."""
        root = self._root
        told: dict[str, str | int] = {
            "model": Path(self.pretrained).name if self._is_local else self.pretrained,
            "revision": "local" if self._is_local else root.name,
            "tokenizers": _hash_of(root, ("tokenizer", "tokenizer_2"))[:16],
            "sequence_length": self.max_sequence_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantize": self.quantize,
        }
        return told | {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A hash of what the features depend on: configurations, tokenizers, weights, length, dtype and quantization.

        Local weights are hashed by name, size and their first and last MiB, which retraining or another precision
        changes; a hub model is named by its revision.
        """
        digest = hashlib.sha256(f"{self.max_sequence_length} {self.dtype} {self.quantize}".encode())
        if self._is_local:
            digest.update(_hash_of(self._root, ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")).encode())
        else:
            digest.update(f"{self.pretrained} {self._root.name}".encode())
        return digest.hexdigest()

    @property
    def _root(self) -> Path:
        return Path(part(self.pretrained, "text_encoder_2", "config.json")).parent.parent

    @property
    def _is_local(self) -> bool:
        return Path(self.pretrained).expanduser().is_dir()

    def unload(self) -> None:
        """Free the weights (T5-XXL takes 9 GiB); `encode` reads them again."""
        self._encoders = None

    def _load(self) -> tuple[CLIPTextModel, T5EncoderModel]:
        if self._encoders is None:
            check_device("data.text_device", self.device)
            clip = load_whole(CLIPTextModel, self.pretrained, "text_encoder", CLIP_IMAGES, dtype=self.dtype)
            t5 = load_whole(T5EncoderModel, self.pretrained, "text_encoder_2", dtype=self.dtype)
            if self.quantize == "int8":
                keep_in_8_bits(t5)
            elif self.quantize == "nf4":
                keep_in_4_bits(t5, but=("wo",))  # transformers casts its input to the dtype of its weight
            self._encoders = clip.eval().to(self.device), t5.eval().to(self.device)
        return self._encoders

    def _tokens(self, tokenizer: CLIPTokenizer | T5TokenizerFast, prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)


def _hash_of(root: Path, folders: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in folders:
        for file in sorted(filter(Path.is_file, (root / name).iterdir())):
            digest.update(json.dumps([name, file.name, file.stat().st_size]).encode())
            digest.update(ends(file))
    return digest.hexdigest()
