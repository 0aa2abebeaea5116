"""The one thing that travels from data to policy."""

from typing import NamedTuple

from torch import Tensor


class Conditions(NamedTuple):
    """A batch of B prompts and the text features that the policy reads.

    Args:
        prompts: the B texts, for rewards and logs.
        prompt_embeds: [B, T, D] sequence features (FLUX: T5), padded to the full length T.
        pooled_prompt_embeds: [B, P] pooled features (FLUX: CLIP).
        indices: [B] int64, each prompt's position in its list; seeds evaluation samples.
    """

    prompts: list[str]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    indices: Tensor

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
        )
