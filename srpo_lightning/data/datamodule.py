"""Prompt files to batches of conditions, in an order that is a function of (seed, step, rank)."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler

from srpo_lightning.batch import Conditions
from srpo_lightning.data.features import FeatureCache
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.draws import permutation
from srpo_lightning.policies.text import FluxTextEncoder, TextFeatures

Item = tuple[str, TextFeatures, int]


class PromptData(LightningDataModule):
    """Training and evaluation prompts with their cached text features.

    Args:
        train: training prompts, a .txt, .jsonl or .parquet file.
        evaluation: held-out prompts for validate, test and predict.
        pretrained: the pipeline whose text encoders are used (follows model.policy.init_args.pretrained).
        batch_size: training prompts per rank and micro-batch.
        eval_batch_size: evaluation prompts per rank and batch.
        num_eval_prompts: the first so many prompts of `evaluation`; None: all.
        eval_samples_per_prompt: how often each of them is drawn, from other noise each time.
        field: the key or column of the prompt in .jsonl and .parquet files.
        cache_dir: where text features are kept between runs.
        max_sequence_length: T5 tokens per prompt; None: what the tokenizer states, at most 512.
        text_dtype: what features are computed and kept in.
        text_batch_size: prompts encoded at once.
        text_device: where prompts are encoded.
        num_workers: processes that read features.
        seed: of the order of training prompts (follows model.seed).
    """

    def __init__(
        self,
        train: str,
        evaluation: str,
        pretrained: str,
        batch_size: PositiveInt = 4,
        eval_batch_size: PositiveInt = 8,
        num_eval_prompts: PositiveInt | None = None,
        eval_samples_per_prompt: PositiveInt = 1,
        field: str = "prompt",
        cache_dir: str = ".cache/features",
        max_sequence_length: PositiveInt | None = None,
        text_dtype: Literal["float32", "bfloat16"] = "float32",
        text_batch_size: PositiveInt = 16,
        text_device: str = "cpu",
        num_workers: NonNegativeInt = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.text_batch_size = text_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.num_batches = 0
        train_set, eval_set = read_prompts(train, field), read_prompts(evaluation, field)
        self.train_prompts, self.eval_prompts = train_set.prompts, eval_set.prompts[:num_eval_prompts]
        self.eval_samples_per_prompt = eval_samples_per_prompt
        self.num_empty = train_set.num_empty + eval_set.num_empty
        encoder = FluxTextEncoder(pretrained, max_sequence_length, getattr(torch, text_dtype), text_device)
        self.cache = FeatureCache(Path(cache_dir).expanduser(), encoder)

    @property
    def eval_tags(self) -> list[list[str]]:
        """The tags of each evaluation prompt."""
        return []

    def prepare_data(self) -> None:
        """Compute missing text features (once per node) and report what was skipped or cut."""
        prompts = [*self.train_prompts, *self.eval_prompts]
        computed = self.cache.fill(prompts, self.text_batch_size)
        truncated = [prompt for prompt in prompts if self.cache.encoder.is_truncated(prompt)]
        rank_zero_info(
            f"prompts: {len(self.train_prompts)} to train, {len(self.eval_prompts)} to evaluate; "
            f"text features: {computed} computed, the rest cached in {self.cache.folder}"
        )
        if self.num_empty:
            rank_zero_info(f"prompts: {self.num_empty} empty lines skipped")
        if truncated:
            rank_zero_info(
                f"prompts: {len(truncated)} cut to the {self.cache.encoder.max_sequence_length} tokens that the text "
                f"encoder reads, first: {truncated[0][:80]!r}"
            )
        self.cache.encoder.unload()

    def train_dataloader(self) -> DataLoader[Item]:
        """An endless stream; a resumed run goes on where the checkpoint was written."""
        sampler = StepSampler(len(self.train_prompts), self.batch_size, self.seed, *self._ranks(), self.num_batches)
        return self._loader(self.train_prompts, sampler)

    def val_dataloader(self) -> DataLoader[Item]:
        """Each rank takes every world-size-th evaluation prompt."""
        prompts = self.eval_prompts * self.eval_samples_per_prompt
        return self._loader(prompts, SliceSampler(len(prompts), self.eval_batch_size, *self._ranks()))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Conditions, dataloader_idx: int) -> Conditions:
        """Count the training batches handed out, in the main process, however many are prefetched."""
        if self.trainer is not None and self.trainer.training:
            self.num_batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.num_batches = state_dict["num_batches"]

    def _loader(self, prompts: list[str], sampler: Sampler[list[int]]) -> DataLoader[Item]:
        return DataLoader(
            PromptDataset(prompts, self.cache),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class PromptDataset(Dataset[Item]):
    """Prompts with their features, by position in the file."""

    def __init__(self, prompts: list[str], cache: FeatureCache) -> None:
        self.prompts, self.cache = prompts, cache

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Item:
        prompt = self.prompts[index]
        return prompt, self.cache[prompt], index


class StepSampler(Sampler[list[int]]):
    """Endless shuffled batches: the one of step s is a function of (seed, s, rank).

    Sample number n of the run, counted over all ranks, is number n mod size of pass n // size; each pass has an order
    of its own and none drops a prompt.

    Args:
        size: number of prompts.
        batch_size: per rank.
        seed: of the order.
        rank: of this process.
        world_size: number of ranks.
        start: steps already taken.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, world_size: int, start: int = 0) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        order = lru_cache(maxsize=2)(lambda epoch: permutation(self.seed, epoch, self.size))
        number = (self.start * self.world_size + self.rank) * self.batch_size
        while True:
            batch = []
            for n in range(number, number + self.batch_size):
                epoch, position = divmod(n, self.size)
                batch.append(int(order(epoch)[position]))
            yield batch
            number += self.world_size * self.batch_size


class SliceSampler(Sampler[list[int]]):
    """Rank r's share of the evaluation prompts: r, r + world_size, ...

    Every rank gets equally many (collective operations would hang otherwise): the first prompts fill the gap, and a
    metric over several ranks counts those few twice.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        per_rank = -(-size // world_size)
        self.indices = [(rank + i * world_size) % size for i in range(per_rank)]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.indices[start : start + self.batch_size]


def collate(items: list[Item]) -> Conditions:
    """Stack items to a batch."""
    prompts, features, indices = zip(*items, strict=True)
    return Conditions(
        list(prompts),
        torch.stack([f.prompt_embeds for f in features]),
        torch.stack([f.pooled_prompt_embeds for f in features]),
        torch.tensor(indices),
    )
