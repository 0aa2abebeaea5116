"""What the common tests ask of a family in small."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from srpo_lightning.batch import Size
from srpo_lightning.policies.flow_policy import FlowPolicy


def as_they_are(noise: Tensor, size: Size) -> Tensor:
    return noise


def prompt_embeds(pipe: Any, prompts: Sequence[str], length: int) -> list[dict[str, Tensor]]:
    """Each prompt's own rows: `encode_prompt` returns a list of them, or padded rows and a mask."""
    embeds, other = pipe.encode_prompt(list(prompts), max_sequence_length=length)
    if isinstance(embeds, Tensor) and other is not None and other.shape == embeds.shape[:2]:
        embeds = [rows[own.bool()] for rows, own in zip(embeds, other, strict=True)]
    return [{"prompt_embeds": rows} for rows in embeds]


class Case(NamedTuple):
    """A family in small.

    Args:
        policy: the family's class.
        write: writes a pipeline folder, as the pipeline's save_pretrained does; `changes` are of the transformer.
        mistakes: the family with one mistake each, which pictures must show.
        guidances: to compare pictures at; 1 is none. With the last of them samples are drawn while training.
        refused: settings that the family cannot have, and what they are to be set to.
        latents: noise of a policy as the pipeline's argument `latents`.
        features: of each prompt, by the pipeline's own `encode_prompt`.
        folder: where `write` wrote to.
    """

    policy: type[FlowPolicy]
    write: Callable[..., Path]
    mistakes: Mapping[str, type[FlowPolicy]]
    guidances: tuple[float, ...] = (1.0, 5.0)
    refused: Mapping[str, tuple[Any, str]] = {}
    latents: Callable[[Tensor, Size], Tensor] = as_they_are
    features: Callable[[Any, Sequence[str], int], list[dict[str, Tensor]]] = prompt_embeds
    folder: Path = Path()

    def unread(self, size: Size = (32, 32), **settings: Any) -> FlowPolicy:
        """The policy without its weights."""
        return self.policy(str(self.folder), *size, **settings)

    def new(self, size: Size = (32, 32), **settings: Any) -> FlowPolicy:
        """The policy with its weights."""
        policy = self.unread(size, **settings)
        policy.load()
        return policy
