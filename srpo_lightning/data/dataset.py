"""Records with their features and latents, one by one and stacked to batches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from srpo_lightning.batch import Conditions, Size, Text
from srpo_lightning.data.columns import Prompt
from srpo_lightning.data.features import FeatureCache
from srpo_lightning.data.images import LatentCache, Picture, latent_key
from srpo_lightning.data.order import Pick
from srpo_lightning.data.prompts import PromptSet
from srpo_lightning.data.tensor_files import key_of


class Item(NamedTuple):
    """A sample of a batch.

    Args:
        prompt: its record.
        features: features of its text by name, [T, ...] or [P].
        number: position of the sample in its list; evaluation passes over the list several times.
        size: pixels of its picture.
        seed: number that its evaluation sample is drawn from.
        x0: [*latent] latents of its real picture.
    """

    prompt: Prompt
    features: dict[str, Tensor]
    number: int
    size: Size | None
    seed: int | None
    x0: Tensor | None


class PromptDataset(Dataset[Item]):
    """Records of several sets, counted through, with their features.

    Args:
        sets: of records; the samples of evaluation count through them again and again.
        cache: open.
        latents: open; None: there are none.
        pictures: the pictures of the last records.
    """

    def __init__(
        self,
        sets: Sequence[PromptSet],
        cache: FeatureCache,
        latents: LatentCache | None,
        pictures: Sequence[Picture],
    ) -> None:
        self.sets, self.cache, self.latents = sets, cache, latents
        self.starts = np.cumsum([0, *(len(own) for own in sets)])
        self.rows = np.concatenate([cache.find([key_of(text) for text in own.prompts]) for own in sets])
        assert (self.rows >= 0).all(), "prepared before"
        self.first_picture = len(self.rows) - len(pictures)
        self.picture_rows = latents.find([latent_key(picture) for picture in pictures]) if latents else None

    def __getitem__(self, pick: Pick) -> Item:
        row = pick.row % len(self.rows)
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        prompt = self.sets[number][int(row - self.starts[number])]
        x0 = None
        if pick.is_real:
            assert self.latents is not None
            assert self.picture_rows is not None
            x0 = self.latents.latents(int(self.picture_rows[row - self.first_picture]))
        seed = prompt.seed if pick.row == row else None  # a second sample of a prompt is another picture
        position = int(pick.row - (self.first_picture if pick.is_real else 0))
        return Item(prompt, self.cache.features(int(self.rows[row])), position, pick.size, seed, x0)


def collate(items: list[Item], ragged: frozenset[str], unconditional: Mapping[str, Tensor] | None) -> Conditions:
    """Stack items to a batch.

    Args:
        items: samples of pictures of one size.
        ragged: names of the sequences of each prompt's own length.
        unconditional: features of the text that guidance moves away from; None: there is none.
    """
    prompts = [item.prompt for item in items]
    latents = [item.x0 for item in items if item.x0 is not None]
    return Conditions(
        [prompt.text for prompt in prompts],
        Text.collate([item.features for item in items], ragged),
        torch.tensor([item.number for item in items]),
        items[0].size,
        torch.stack(latents) if latents else None,
        _if_any([item.seed for item in items]),
        _if_any([prompt.negative_prompt for prompt in prompts]),
        [prompt.tags or [] for prompt in prompts] if any(prompt.tags for prompt in prompts) else None,
        None if unconditional is None else Text.collate([unconditional], ragged),
    )


def _if_any(values: list[Any]) -> list[Any] | None:
    return values if any(value is not None for value in values) else None
