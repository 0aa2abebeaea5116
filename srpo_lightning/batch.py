"""The one thing that travels from data to policy."""

from typing import NamedTuple, TypeAlias

from torch import Tensor

Size: TypeAlias = tuple[int, int]
"""Height and width of a picture in pixels."""


class Conditions(NamedTuple):
    """A batch of B prompts and the text features that the policy reads.

    Args:
        prompts: the B texts, for rewards and logs.
        prompt_embeds: [B, T, D] sequence features (FLUX: T5), padded to the full length T.
        pooled_prompt_embeds: [B, P] pooled features (FLUX: CLIP).
        indices: [B] int64, each prompt's position in its list.
        size: of the pictures of this batch; None: the policy's own.
        x0: [B, L, C] clean latents of real images with these captions, in the policy's packing; None: there are none.
        seeds: what each prompt's evaluation sample is drawn from; where None, that is its position.
        negative_prompts: what each picture should move away from; where None, the objective's negative word says it.
        tags: of each prompt, to report by.
    """

    prompts: list[str]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    indices: Tensor
    size: Size | None = None
    x0: Tensor | None = None
    seeds: list[int | None] | None = None
    negative_prompts: list[str | None] | None = None
    tags: list[list[str]] | None = None

    @property
    def batch_size(self) -> int:
        """B (`len` is the number of fields, as of any tuple)."""
        return len(self.prompts)

    def repeat(self, times: int) -> "Conditions":
        """The batch `times` over, one whole copy after the other."""
        return Conditions(
            self.prompts * times,
            self.prompt_embeds.repeat(times, 1, 1),
            self.pooled_prompt_embeds.repeat(times, 1),
            self.indices.repeat(times),
            self.size,
            None if self.x0 is None else self.x0.repeat(times, 1, 1),
            self.seeds and self.seeds * times,
            self.negative_prompts and self.negative_prompts * times,
            self.tags and self.tags * times,
        )

    def take(self, rows: slice) -> "Conditions":
        """Some prompts of the batch."""
        return Conditions(
            self.prompts[rows],
            self.prompt_embeds[rows],
            self.pooled_prompt_embeds[rows],
            self.indices[rows],
            self.size,
            None if self.x0 is None else self.x0[rows],
            self.seeds and self.seeds[rows],
            self.negative_prompts and self.negative_prompts[rows],
            self.tags and self.tags[rows],
        )
