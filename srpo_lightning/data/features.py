"""Text features, computed once per prompt and model, and looked up by both."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from srpo_lightning.data.manifest import CURE
from srpo_lightning.data.store import ParquetStore, per_file
from srpo_lightning.data.tensor_files import Item, key_of
from srpo_lightning.encoding import TextEncoder


class FeatureCache(ParquetStore):
    """The text features of prompts.

    Args:
        folder: of the caches of all encoders, here or on s3://, gs:// or hf://.
        encoder: whose features these are; its weights are read only if a prompt is missing.
        mirror: See `ParquetStore`.
        mirror_gigabytes: See `ParquetStore`.
    """

    def __init__(
        self,
        folder: str,
        encoder: TextEncoder,
        mirror: str = ".cache/mirror",
        mirror_gigabytes: float | None = None,
    ) -> None:
        super().__init__(folder, encoder.description(), mirror, mirror_gigabytes)
        self.encoder = encoder

    @property
    def item_bytes(self) -> int:
        """Of one prompt's features at most, before compression."""
        return sum(math.prod(shape) for shape in self.encoder.shapes.values()) * self.encoder.dtype.itemsize

    @property
    def items_per_file(self) -> int:
        """How many prompts make a file."""
        return per_file(self.item_bytes)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose features are not there, each once."""
        rows = self.find([key_of(prompt) for prompt in prompts])
        return list(dict.fromkeys(prompt for prompt, row in zip(prompts, rows, strict=True) if row < 0))

    def add(self, prompts: Sequence[str], batch_size: int) -> int:
        """Compute what is missing; returns how many prompts that were. Interrupted, it goes on where it stopped."""
        return self.fill([(key_of(prompt), prompt) for prompt in prompts], self.encode, batch_size, self.items_per_file)

    def encode(self, prompts: list[Any]) -> list[Item]:
        """The features of prompts, as they are stored."""
        return list(self.encoder.encode(prompts))

    def features(self, row: int) -> dict[str, Tensor]:
        """The features in a row, by name."""
        return self.read(row)

    def __getitem__(self, prompt: str) -> dict[str, Tensor]:
        """The features of a prompt that is there."""
        (row,) = self.find([key_of(prompt)])
        if row < 0:
            raise ValueError(f"{self.folder} lacks the features of {prompt[:80]!r}: {CURE}")
        return self.features(int(row))

    def __getstate__(self) -> dict[str, Any]:
        """Workers read features only."""
        return super().__getstate__() | {"encoder": None}
