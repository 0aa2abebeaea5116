"""Text features on disk: computed once per prompt and model, looked up by both."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from srpo_lightning.policies.text import FluxTextEncoder, TextFeatures


class FeatureCache:
    """One safetensors file per prompt, in a folder per text encoder.

    Args:
        folder: holds the caches of all encoders.
        encoder: whose features these are; its weights are read only if a prompt is missing.
    """

    def __init__(self, folder: Path, encoder: FluxTextEncoder) -> None:
        self.encoder = encoder
        self.folder = folder / encoder.fingerprint()[:16]

    def fill(self, prompts: Iterable[str], batch_size: int) -> int:
        """Compute what is missing; returns how many prompts that were. Interrupted, it goes on where it stopped."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self._file(prompt).is_file()]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for prompt, features in zip(batch, self.encoder.encode(batch), strict=True):
                self._write(prompt, features)
        return len(missing)

    def __getitem__(self, prompt: str) -> TextFeatures:
        """The features of a prompt that `fill` has seen."""
        return TextFeatures(**load_file(self._file(prompt)))

    def _file(self, prompt: str) -> Path:
        name = hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _write(self, prompt: str, features: TextFeatures) -> None:
        file = self._file(prompt)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".partial-{os.getpid()}")
        save_file(features._asdict(), partial)
        partial.replace(file)
