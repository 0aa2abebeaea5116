"""Prompts and pictures in, batches of conditions out, in an order that is a function of (seed, step, rank)."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler

from srpo_lightning.batch import Conditions, Size
from srpo_lightning.data.dataset import PromptDataset, collate
from srpo_lightning.data.features import FeatureCache
from srpo_lightning.data.images import LatentCache, Picture
from srpo_lightning.data.order import Order, Pick, Rows, Segment, SliceSampler, StepSampler, streams_of
from srpo_lightning.data.picture_files import LIMITS, Limits
from srpo_lightning.data.preparation import Preparation
from srpo_lightning.data.prompts import PromptSet, Sources
from srpo_lightning.data.records import Records
from srpo_lightning.data.selection import Selection, check_cells, check_sources, select, select_evaluation, sizes_of
from srpo_lightning.encoding import Encoder, Encoding, ImageEncoder
from srpo_lightning.training.agreement import digest
from srpo_lightning.training.context import data_rank


class PromptData(LightningDataModule):
    """Training and evaluation prompts with their cached text features, and real pictures with their cached latents.

    Args:
        train: Training prompts: a path, or a source with its columns, or a list of these.
        encoder: Way of the policy to its encoders, `Policy.encoder` (follows model.policy).
        evaluation: Held-out prompts for validate, test and predict; null takes `validation_fraction` of
            the training prompts.
        validation_fraction: Share of the training prompts that is held out, by a hash of the text: adding prompts
            moves none.
        images: Captions with real pictures, or with clips where the policy draws clips; null takes those training
            records that name one.
        offline_ratio: Share of the steps that train on real pictures instead of the policy's own.
        picture_latents: Latents of a real picture: the mode of the VAE's posterior, or a sample of it as in the
            research code of SRPO, drawn once for each picture.
        batch_size: Training prompts per rank and micro-batch; ranks that share samples count as one.
        repeats: Times that each batch comes in a row (follows model.updates_per_rollout).
        eval_batch_size: Evaluation prompts per rank and batch.
        num_eval_prompts: Number of prompts of `evaluation` that are drawn, from the first on; null draws all.
        eval_samples_per_prompt: Pictures of each evaluation prompt, from other noise each time.
        sizes: Sizes [width, height] of pictures in pixels, for records without their own: one is drawn per step, and a
            real picture goes to that of the nearest aspect ratio; null takes the policy's own.
        cache_dir: Folder where text features and latents are kept between runs; on s3://, gs:// or hf:// they are only
            read.
        mirror_dir: Folder of this machine where files of a remote `cache_dir` are kept.
        mirror_gigabytes: Disk space for files in `mirror_dir`: those go that were not used for longest, unless they
            are open; null is no limit.
        max_picture_megapixels: Megapixels of the largest real picture that is decoded; larger ones are refused before.
        max_picture_megabytes: Megabytes of the largest real picture file that is read; larger ones are refused before.
        max_prompts_to_encode: Number of new prompts that fit encodes by itself; beyond it says how to run `cache`.
        max_sequence_length: T5 tokens per prompt; null takes what the tokenizer states, at most 512.
        text_dtype: Precision in which text features are computed and kept.
        text_quantize: Bits per weight of T5 while it encodes: 8 (int8), 4 (nf4) or all (none).
        text_batch_size: Prompts or pictures encoded at once.
        text_device: Device on which prompts and pictures are encoded.
        shuffle_window: Number of prompts of a large set that are shuffled among each other, so that few files are open.
        num_workers: Processes that read features.
        seed: Seed of the order of training prompts (follows model.seed).
    """

    def __init__(
        self,
        train: Sources,
        encoder: Callable[[Encoding], Encoder],
        evaluation: Sources | None = None,
        validation_fraction: ClosedUnitInterval = 0.0,
        images: Sources | None = None,
        offline_ratio: ClosedUnitInterval = 0.0,
        picture_latents: Literal["mode", "sample"] = "mode",
        batch_size: PositiveInt = 4,
        repeats: PositiveInt = 1,
        eval_batch_size: PositiveInt = 8,
        num_eval_prompts: PositiveInt | None = None,
        eval_samples_per_prompt: PositiveInt = 1,
        sizes: list[tuple[PositiveInt, PositiveInt]] | None = None,
        cache_dir: str = ".cache/features",
        mirror_dir: str = ".cache/mirror",
        mirror_gigabytes: PositiveFloat | None = None,
        max_picture_megapixels: PositiveInt = LIMITS.megapixels,
        max_picture_megabytes: PositiveInt = LIMITS.megabytes,
        max_prompts_to_encode: NonNegativeInt = 2000,
        max_sequence_length: PositiveInt | None = None,
        text_dtype: Literal["float32", "bfloat16"] = "float32",
        text_quantize: Literal["none", "int8", "nf4"] = "none",
        text_batch_size: PositiveInt = 16,
        text_device: str = "cpu",
        shuffle_window: PositiveInt = 8192,
        num_workers: NonNegativeInt = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.repeats = batch_size, eval_batch_size, repeats
        self.num_workers, self.seed, self.shuffle_window = num_workers, seed, shuffle_window
        self.eval_samples_per_prompt, self.offline_ratio = eval_samples_per_prompt, offline_ratio
        self.num_batches = 0
        self.segments: list[Segment] = []
        self.sampler: StepSampler | None = None
        self.records_before: Records | None = None
        check_sources(evaluation, validation_fraction, images, offline_ratio)
        dtype = getattr(torch, text_dtype)
        own = encoder(
            Encoding(max_sequence_length, dtype, text_device, text_quantize, draws=picture_latents == "sample")
        )
        self.sizes, self.cell = sizes_of(sizes, own.cell), own.cell
        self.num_eval_prompts = num_eval_prompts
        self._held_out = partial(select_evaluation, train, evaluation, validation_fraction)
        self._all = partial(
            select,
            *(train, evaluation, validation_fraction, images, offline_ratio),
            *(self.sizes or [own.size], Limits(max_picture_megapixels, max_picture_megabytes), own.num_frames),
        )
        mirror = mirror_dir, mirror_gigabytes
        self.cache = FeatureCache(cache_dir, own.text, *mirror)
        self.image_encoder = _image_encoder(own) if offline_ratio else None
        self.latents = LatentCache(cache_dir, self.image_encoder.description(), *mirror) if self.image_encoder else None
        self.text_batch_size, self.max_prompts_to_encode = text_batch_size, max_prompts_to_encode

    @cached_property
    def selection(self) -> Selection:
        """All records, read when first asked for: to evaluate, neither training prompts nor pictures need be there."""
        return self._cut(self._all())

    @cached_property
    def to_evaluate(self) -> Selection:
        """The records without what is trained on."""
        if "selection" in vars(self):
            return Selection([], [], [], self.selection.evaluation, 0)
        return self._cut(self._held_out())

    @property
    def evaluation(self) -> PromptSet:
        """The held-out records."""
        return self.to_evaluate.evaluation

    def read(self, trains: bool) -> Selection:
        """Read what a run needs, once, and refuse what cannot be read.

        Args:
            trains: also what is trained on.
        """
        return self.selection if trains else self.to_evaluate

    @property
    def preparation(self) -> Preparation:
        """Of what this run needs."""
        latents, encoder = (self.latents, self.image_encoder) if self._trains else (None, None)
        return Preparation(
            self.read(self._trains), self.cache, latents, encoder, self.text_batch_size, self.max_prompts_to_encode
        )

    @property
    def _trains(self) -> bool:
        return self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING

    def _cut(self, selection: Selection) -> Selection:
        check_cells(selection, self.cell)
        return selection._replace(evaluation=selection.evaluation[: self.num_eval_prompts])

    @property
    def train_prompts(self) -> list[str]:
        """The training prompts, in the order of their sources."""
        return [text for source in self.selection.train for text in source.prompts.prompts]

    @property
    def trained_prompts(self) -> list[str]:
        """The same, and the captions of real pictures."""
        return [text for own in self.selection.sets for text in own.prompts]

    @property
    def eval_prompts(self) -> list[str]:
        """The evaluation prompts."""
        return self.evaluation.prompts

    @property
    def eval_tags(self) -> list[list[str]]:
        """The tags of each evaluation prompt."""
        return [record.tags or [] for record in self.evaluation]

    def prepare_data(self) -> None:
        """Compute missing features (once per node) and report what was skipped or cut."""
        self.preparation.run()

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless stream; a resumed run goes on where the checkpoint was written."""
        rank, world_size = self._ranks()
        present = Segment(self.num_batches // self.repeats, self.batch_size * world_size)
        if self.records_before and (change := self.records.since(self.records_before)):
            rank_zero_info(f"{change}: a new pass over all of them begins")
            self.segments = [present]
        elif not self.segments or self.segments[-1].samples_per_step != present.samples_per_step:
            self.segments = [*self.segments, present]
        self.records_before = None
        self.sampler = StepSampler(self._order(), self.batch_size, rank, self.num_batches, self.repeats)
        sets = [source.prompts for source in (*self.selection.train, *self.selection.images)]
        return self._loader(sets, self.sampler, self.selection.pictures if self.offline_ratio else [])

    def val_dataloader(self) -> DataLoader[Any]:
        """Each rank takes every world-size-th evaluation prompt of each size."""
        own = self.evaluation.sizes
        rows: dict[Size | None, list[int]] = {}
        for number in range(len(own) * self.eval_samples_per_prompt):
            index = number % len(own)
            size = own[index] or (self.sizes[index % len(self.sizes)] if self.sizes else None)
            rows.setdefault(size, []).append(number)
        sampler = SliceSampler(rows, self.eval_batch_size, *self._ranks())
        return self._loader([self.evaluation], sampler, [])

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Conditions, dataloader_idx: int) -> Conditions:
        """Count the training batches handed out, in the main process, however many are prefetched."""
        if self.trainer is not None and self.trainer.training:
            assert self.sampler is not None
            self.num_batches += 1
            self.sampler.start = self.num_batches
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and of what."""
        segments = [list(segment) for segment in self.segments]
        return {"num_batches": self.num_batches, "segments": segments, "records": self.records._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.num_batches = state_dict["num_batches"]
        self.segments = [Segment(*segment) for segment in state_dict["segments"]]
        if "records" in state_dict:
            self.records_before = Records(**state_dict["records"])

    @cached_property
    def records(self) -> "Records":
        """What is trained on, to tell it from other prompts."""
        return Records.of(self.trained_prompts, self._order())

    @cached_property
    def described(self) -> dict[str, tuple[str, str]]:
        """The prompts and pictures of this process, by name: what is equal where they are equal, and their number."""
        facts = {"evaluation prompts": (digest(map(repr, self.evaluation)), f"{len(self.evaluation)} of them")}
        if self._trains:
            pictures = self.selection.pictures
            facts["training prompts"] = (str(self.records), f"{len(self.trained_prompts)} of them")
            facts["pictures"] = (digest(map(repr, pictures)), f"{len(pictures)} of them")
        return facts

    def _order(self) -> Order:
        first = 0
        kinds: list[list[tuple[Rows, Sequence[Size | None], float]]] = []
        for kind in (self.selection.train, self.selection.images):
            parts = []
            for source in kind:
                rows = np.arange(first, first + len(source.prompts))
                parts.append((rows, source.sizes, source.weight))
                first += len(source.prompts)
            kinds.append(parts)
        shares = (1 - self.offline_ratio, self.offline_ratio)
        streams = [
            stream._replace(share=stream.share * share, is_real=is_real)
            for parts, share, is_real in zip(kinds, shares, (False, True), strict=True)
            if share
            for stream in streams_of(parts, self.sizes)
        ]
        return Order(streams, self.seed, self.shuffle_window, self.segments)

    def _loader(
        self, sets: list[PromptSet], sampler: Sampler[list[Pick]], pictures: Sequence[Picture]
    ) -> DataLoader[Any]:
        self.preparation.open()
        text = self.cache.encoder
        unconditional = None if text.negative is None else self.cache[text.negative]
        return DataLoader(
            PromptDataset(sets, self.cache, self.latents, pictures),
            batch_sampler=sampler,
            collate_fn=partial(collate, ragged=text.ragged, unconditional=unconditional),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _ranks(self) -> tuple[int, int]:
        return data_rank(self.trainer)[:2] if self.trainer else (0, 1)


def _image_encoder(encoder: Encoder) -> ImageEncoder:
    if encoder.images is None:
        raise ValueError("data.offline_ratio is above 0, but the policy trains on no real pictures: set it to 0")
    return encoder.images()
