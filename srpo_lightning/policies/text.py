"""FLUX.1's text features: T5's sequence and CLIP's pooled vector, as diffusers' FluxPipeline computes them."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_lightning.pretrained import part, unreadable_is_refused

SAMPLED_BYTES = 1 << 20


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
    """

    def __init__(
        self,
        pretrained: str,
        max_sequence_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        part(pretrained, "text_encoder_2", "config.json")
        self.pretrained, self.dtype, self.device = pretrained, dtype, device
        with unreadable_is_refused(pretrained):
            self.clip_tokenizer = CLIPTokenizer.from_pretrained(pretrained, subfolder="tokenizer")
            self.t5_tokenizer = T5TokenizerFast.from_pretrained(pretrained, subfolder="tokenizer_2")
        self.max_sequence_length = max_sequence_length or min(int(self.t5_tokenizer.model_max_length), 512)
        self._encoders: tuple[CLIPTextModel, T5EncoderModel] | None = None

    def is_truncated(self, prompt: str) -> bool:
        """Whether T5 reads less than the whole prompt."""
        return len(self.t5_tokenizer(prompt).input_ids) > self.max_sequence_length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[TextFeatures]:
        """Features of each prompt, on the CPU."""
        clip, t5 = self._load()
        clip_ids = self._tokens(self.clip_tokenizer, prompts, self.clip_tokenizer.model_max_length)
        t5_ids = self._tokens(self.t5_tokenizer, prompts, self.max_sequence_length)
        pooled = clip(clip_ids).pooler_output.cpu()
        sequence = t5(t5_ids)[0].cpu()
        return [TextFeatures(s.clone(), p.clone()) for s, p in zip(sequence, pooled, strict=True)]

    def fingerprint(self) -> str:
        """A hash of what the features depend on: configurations, tokenizers, weights, length and dtype.

        Local weights are hashed by name, size and their first and last MiB, which retraining or another precision
        changes; a hub model is named by its revision.
        """
        digest = hashlib.sha256(f"{self.max_sequence_length} {self.dtype}".encode())
        root = Path(part(self.pretrained, "text_encoder_2", "config.json")).parent.parent
        if not Path(self.pretrained).expanduser().is_dir():
            digest.update(f"{self.pretrained} {root.name}".encode())
            return digest.hexdigest()
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            for file in sorted((root / name).iterdir()):
                digest.update(json.dumps([name, file.name, file.stat().st_size]).encode())
                digest.update(_ends(file))
        return digest.hexdigest()

    def unload(self) -> None:
        """Free the weights (T5-XXL takes 9 GiB); `encode` reads them again."""
        self._encoders = None

    def _load(self) -> tuple[CLIPTextModel, T5EncoderModel]:
        if self._encoders is None:
            kwargs = {"dtype": self.dtype, "use_safetensors": True}
            with unreadable_is_refused(self.pretrained):
                clip = CLIPTextModel.from_pretrained(self.pretrained, subfolder="text_encoder", **kwargs)
                t5 = T5EncoderModel.from_pretrained(self.pretrained, subfolder="text_encoder_2", **kwargs)
            self._encoders = clip.eval().to(self.device), t5.eval().to(self.device)
        return self._encoders

    def _tokens(self, tokenizer: CLIPTokenizer | T5TokenizerFast, prompts: list[str], length: int) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)


def _ends(file: Path) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(SAMPLED_BYTES)
        stream.seek(max(file.stat().st_size - SAMPLED_BYTES, 0))
        return first + stream.read(SAMPLED_BYTES)
