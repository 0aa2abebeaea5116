"""What data asks of a policy: prompts and pictures in, what the policy reads out."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from srpo_lightning.batch import Size

Quantize: TypeAlias = Literal["none", "int8", "nf4"]


class Encoding(NamedTuple):
    """How prompts and pictures are encoded.

    Args:
        max_sequence_length: tokens per prompt; None: as many as the model was trained with.
        dtype: numbers in which the text encoders compute, and of their features.
        device: where encoders run.
        quantize: bits per weight of the largest text encoder.
        draws: whether a picture's latents are a sample of the VAE's posterior, not its mode.
    """

    max_sequence_length: int | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    quantize: Quantize = "none"
    draws: bool = False


class TextEncoder(Protocol):
    """Features of prompts. Weights are read on first use."""

    device: str | torch.device
    dtype: torch.dtype
    max_sequence_length: int
    """Tokens per prompt beyond which a prompt is cut."""

    negative: str | None
    """The text that classifier-free guidance moves away from; None: the policy needs none."""

    @property
    def ragged(self) -> frozenset[str]:
        """Names of the sequences that have each prompt's own length."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The largest shape of one prompt's features, by name."""

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """How many tokens each prompt is."""

    def encode(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Features of each prompt by name, [T, ...] or [P], on the CPU."""

    def description(self) -> dict[str, str | int]:
        """What features depend on, for people to read, and a `fingerprint` of all of it."""

    def unload(self) -> None:
        """Free the weights; `encode` reads them again."""


class ImageEncoder(Protocol):
    """Latents of pictures. Weights are read on first use."""

    device: str | torch.device

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], or clips, to clean latents [B, *latent], float32 on the CPU."""

    def description(self) -> dict[str, str | int]:
        """What latents depend on, for people to read, and a `fingerprint` of all of it."""

    def unload(self) -> None:
        """Free the weights; `encode` reads them again."""


class Encoder(NamedTuple):
    """Both encoders of a policy.

    Args:
        text: features of prompts.
        images: makes the encoder of pictures; None: the policy trains on no real pictures.
        size: pixels of a picture that asks for no size of its own.
        cell: pixels that the sides of every picture are a multiple of.
        num_frames: frames of a clip; real pictures are clips where they are more than one.
    """

    text: TextEncoder
    images: Callable[[], ImageEncoder] | None
    size: Size
    cell: int
    num_frames: int = 1
