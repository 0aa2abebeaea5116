"""The one thing that travels from data to policy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Size: TypeAlias = tuple[int, int]
"""Height and width of a picture in pixels."""


class Text(NamedTuple):
    """What a policy reads of B prompts.

    Args:
        tensors: features by their names, each [B, T, ...] for a sequence or [B, P] for a vector. The rows beyond a
            prompt's own length are zeros.
        lengths: [B] int64, the number of each prompt's own rows; None where all rows count, padding included.
    """

    tensors: dict[str, Tensor]
    lengths: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(next(iter(self.tensors.values())))

    def mask(self, name: str) -> Tensor | None:
        """[B, T], true for a prompt's own rows of a sequence; None where all rows count."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.tensors[name].shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]

    def rows(self, name: str) -> list[Tensor]:
        """Each prompt's own rows of a sequence, without padding; lengths on a GPU are waited for."""
        tensor = self.tensors[name]
        if self.lengths is None:
            return list(tensor)
        return [own[:length] for own, length in zip(tensor, self.lengths.tolist(), strict=True)]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """The same change of every tensor, lengths included."""
        lengths = None if self.lengths is None else change(self.lengths)
        return Text({name: change(tensor) for name, tensor in self.tensors.items()}, lengths)

    def expand(self, batch_size: int) -> "Text":
        """One prompt's features for a whole batch, without a copy; those of a whole batch as they are."""
        return self.each(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    @classmethod
    def collate(cls, items: Sequence[Mapping[str, Tensor]], ragged: Collection[str] = ()) -> "Text":
        """Stack the features of single prompts.

        Args:
            items: features of each prompt, [T, ...] or [P].
            ragged: names of the sequences of each prompt's own length, which all of these share.
        """
        if not ragged:
            return cls({name: torch.stack([item[name] for item in items]) for name in items[0]})
        lengths = torch.tensor([len(item[next(iter(ragged))]) for item in items])
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True)
            if name in ragged
            else torch.stack([item[name] for item in items])
            for name in items[0]
        }
        return cls(padded, lengths)


class Conditions(NamedTuple):
    """A batch of B prompts and what the policy reads of them.

    Args:
        prompts: the B texts, for rewards and logs.
        text: features of the texts.
        indices: [B] int64, each prompt's position in its list.
        size: pixels of the pictures of this batch; None: the policy's own.
        x0: [B, *latent] clean latents of real pictures with these captions; None: there are none.
        seeds: numbers that each prompt's evaluation sample is drawn from; where None, its position is.
        negative_prompts: texts that each picture should move away from under the reward; where None, the objective's
            negative word says it. Classifier-free guidance knows nothing of them.
        tags: labels of each prompt, to report by.
        unconditional: features of the text that classifier-free guidance moves away from, of one row for the whole
            batch or of B; None: the policy needs none.
    """

    prompts: list[str]
    text: Text
    indices: Tensor
    size: Size | None = None
    x0: Tensor | None = None
    seeds: list[int | None] | None = None
    negative_prompts: list[str | None] | None = None
    tags: list[list[str]] | None = None
    unconditional: Text | None = None

    @property
    def batch_size(self) -> int:
        """B (`len` is the number of fields, as of any tuple)."""
        return len(self.prompts)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.indices.device

    def repeat(self, times: int) -> "Conditions":
        """The batch `times` over, one whole copy after the other."""
        return self._each(lambda rows: rows * times, lambda rows: rows.repeat(times, *[1] * (rows.ndim - 1)))

    def take(self, rows: slice) -> "Conditions":
        """Some prompts of the batch."""
        return self._each(lambda own: own[rows], lambda own: own[rows])

    def _each(self, of_lists: Callable[[list[Any]], list[Any]], of_tensors: Callable[[Tensor], Tensor]) -> "Conditions":
        def changed(value: Any) -> Any:
            if isinstance(value, Text):
                is_shared = value.batch_size == 1 < self.batch_size
                return value if is_shared else value.each(of_tensors)
            if isinstance(value, Tensor):
                return of_tensors(value)
            return of_lists(value) if isinstance(value, list) else value  # a size, or nothing

        return Conditions(*map(changed, self))
