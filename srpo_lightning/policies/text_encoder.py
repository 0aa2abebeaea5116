"""What the text encoders of all families share: reading, rounding, naming what features depend on, freeing."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from srpo_lightning.encoding import Encoding, Quantize
from srpo_lightning.errors import naming
from srpo_lightning.files.fingerprint import ends
from srpo_lightning.files.pretrained import load_whole, part, read_by, read_json
from srpo_lightning.training.devices import check_device
from srpo_lightning.training.nf4 import check_bitsandbytes, keep_in_4_bits, keep_in_8_bits


class PipelineTextEncoder(ABC):
    """The text encoders of a pipeline folder. Tokenizers load at once, weights on first use.

    A family says what it reads, and how, in `features`.

    Args:
        pretrained: folder in the layout of a diffusers pipeline, or a hub id.
        max_sequence_length: tokens per prompt, padding included where a model attends to it: part of what it was
            trained on. None: as many as the counting tokenizer states, at most `most_tokens`.
        dtype: numbers in which the encoders compute, and of the features.
        device: where the encoders run.
        quantize: int8 or nf4 keeps the linear layers of `quantized` in 8 or 4 bits per weight; its features differ from
            those of whole weights. Needs the extra `quant`.
    """

    tokenizer_classes: ClassVar[Mapping[str, str]]
    """The classes of transformers that read the pipeline's tokenizers, by folder."""

    model_classes: ClassVar[Mapping[str, str]]
    """The classes of transformers that read the pipeline's text encoders, by folder."""

    counting: ClassVar[str]
    """The tokenizer that prompts are cut by."""

    quantized: ClassVar[str]
    """The encoder that `quantize` is for."""

    whole_layers: ClassVar[tuple[str, ...]] = ()
    """Layers of it that are never in 4 bits."""

    unread: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Prefixes of weights that a folder may hold and nobody reads, by folder."""

    version: ClassVar[int] = 1
    """Raised when a release reads texts otherwise, so that no features of an earlier one are taken."""

    most_tokens: ClassVar[int] = 512
    ragged: ClassVar[frozenset[str]] = frozenset()
    negative: str | None = None

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
        if max_sequence_length is not None and max_sequence_length > self.most_tokens:
            raise ValueError(
                f"data.max_sequence_length is {max_sequence_length}: the model reads {self.most_tokens} tokens at "
                "most, set it to that or less"
            )
        with naming(f"data.text_device is {device}"):
            torch.device(device)
        part(pretrained, self.quantized, "config.json")
        self.pretrained, self.dtype, self.device = pretrained, dtype, device
        self.quantize = quantize
        self.tokenizers: dict[str, Any] = {
            name: read_by(getattr(transformers, cls), pretrained, name) for name, cls in self.tokenizer_classes.items()
        }
        stated = int(self.tokenizers[self.counting].model_max_length)
        self.max_sequence_length = max_sequence_length or min(stated, self.most_tokens)
        self._models: dict[str, Any] | None = None

    @classmethod
    def of(cls, pretrained: str, wanted: Encoding) -> "PipelineTextEncoder":
        """The encoder that data asks for."""
        return cls(pretrained, wanted.max_sequence_length, wanted.dtype, wanted.device, wanted.quantize)

    @classmethod
    @abstractmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """The largest shape of one prompt's features by name, from configurations alone."""

    @classmethod
    def layers_read(cls, pretrained: str) -> tuple[int, ...]:  # noqa: ARG003  # Krea 2's say so in a file
        """The layers of `quantized` that features are read from, where they are others than the last ones."""
        return ()

    @classmethod
    def longest(cls, pretrained: str) -> int:
        """Tokens per prompt where nobody says how many, from configurations alone."""
        return min(
            int(read_json(pretrained, cls.counting, "tokenizer_config.json")["model_max_length"]), cls.most_tokens
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The largest shape of one prompt's features, by name."""
        return self.shapes_of(self.pretrained, self.max_sequence_length)

    @abstractmethod
    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Features of each prompt by name, [T, ...] or [P].

        Args:
            prompts: texts.
            models: text encoders, on the device.
        """

    def templated(self, prompt: str) -> str:
        """A prompt as its encoder reads it, which may have been trained on conversations."""
        return prompt

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt is, its end included; what exceeds `max_sequence_length` is cut off."""
        texts = [self.templated(prompt) for prompt in prompts]
        return [len(ids) for ids in self.tokenizers[self.counting](texts).input_ids]

    def padded(self, tokenizer: str, texts: list[str], length: int, **settings: Any) -> Any:
        """`input_ids` and `attention_mask` [B, length] of a tokenizer, on the device; texts are cut and filled up."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"} | settings
        return self.tokenizers[tokenizer](texts, max_length=length, **settings).to(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Features of each prompt, on the CPU."""
        found = self.features(prompts, self._load())
        return [{name: tensor.cpu().clone() for name, tensor in own.items()} for own in found]

    def description(self) -> dict[str, str | int]:
        """What the features depend on, for people to read, and a `fingerprint` of all of it, files included."""
        root = self._root
        told: dict[str, str | int] = {
            "model": Path(self.pretrained).name if self._is_local else self.pretrained,
            "revision": "local" if self._is_local else root.name,
            "tokenizers": _hash_of(root, tuple(self.tokenizer_classes))[:16],
            "sequence_length": self.max_sequence_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantize": self.quantize,
        }
        return told | {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A hash of what the features depend on: how texts are read, files, length, dtype and quantization.

        Local weights are hashed by name, size and their first and last MiB, which retraining or another precision
        changes; a hub model is named by its revision.
        """
        own = f"{type(self).__name__} {self.version} {self.layers_read(self.pretrained)}"
        digest = hashlib.sha256(f"{own} {self.max_sequence_length} {self.dtype} {self.quantize}".encode())
        if self._is_local:
            digest.update(_hash_of(self._root, (*self.model_classes, *self.tokenizer_classes)).encode())
        else:
            digest.update(f"{self.pretrained} {self._root.name}".encode())
        return digest.hexdigest()

    @property
    def _root(self) -> Path:
        return Path(part(self.pretrained, self.quantized, "config.json")).parent.parent

    @property
    def _is_local(self) -> bool:
        return Path(self.pretrained).expanduser().is_dir()

    def unload(self) -> None:
        """Free the weights, which may be many GiB; `encode` reads them again."""
        self._models = None

    def _load(self) -> dict[str, Any]:
        if self._models is None:
            check_device("data.text_device", self.device)
            models = {
                name: load_whole(
                    getattr(transformers, cls), self.pretrained, name, self.unread.get(name, ()), dtype=self.dtype
                )
                for name, cls in self.model_classes.items()
            }
            if self.quantize == "int8":
                keep_in_8_bits(models[self.quantized], self.device)
            elif self.quantize == "nf4":
                keep_in_4_bits(models[self.quantized], but=self.whole_layers)
            self._models = {name: model.eval().to(self.device) for name, model in models.items()}
        return self._models


def _hash_of(root: Path, folders: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in folders:
        for file in sorted(filter(Path.is_file, (root / name).iterdir())):
            digest.update(json.dumps([name, file.name, file.stat().st_size]).encode())
            digest.update(ends(file))
    return digest.hexdigest()
