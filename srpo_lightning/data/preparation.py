"""What happens before the first step: features are computed or found, and what was left out is reported."""

import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from srpo_lightning.data.features import FeatureCache
from srpo_lightning.data.images import LatentCache, at_once
from srpo_lightning.data.selection import Selection
from srpo_lightning.encoding import ImageEncoder

SAMPLED = 10_000  # prompts whose lengths are looked at, evenly over the set


class Preparation(NamedTuple):
    """Brings the caches of a run up to date.

    Args:
        selection: the records.
        cache: of text features.
        latents: of real pictures, with `image_encoder`.
        image_encoder: None: there are no pictures.
        batch_size: prompts or pictures encoded at once.
        max_to_encode: the most that are encoded here.
    """

    selection: Selection
    cache: FeatureCache
    latents: LatentCache | None
    image_encoder: ImageEncoder | None
    batch_size: int
    max_to_encode: int

    def run(self) -> None:
        """Compute what is missing, if that is little, and report.

        Raises:
            ValueError: with the command to run, if much is missing; with the file and the cure, if a cache is damaged.
        """
        texts = with_negative(self.selection.texts, self.cache.encoder.negative)
        missing = self.missing(texts)
        if missing:
            self._refuse_many(len(missing), len(texts), "prompts", self.cache.others())
            self.cache.add(texts, self.batch_size)
        self.cache.encoder.unload()
        num_pictures = self._encode_pictures()
        self._report(self.selection.texts, len(missing), num_pictures)

    def open(self) -> None:
        """Read the manifests, in every process of a run."""
        self.cache.open()
        if self.latents:
            self.latents.open()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The prompts without features."""
        self.cache.open(mend=len(texts) <= self.max_to_encode)
        return self.cache.missing(texts)

    def _encode_pictures(self) -> int:
        if self.latents is None or self.image_encoder is None:
            return 0
        pictures = self.selection.pictures
        self.latents.open(mend=len(pictures) <= self.max_to_encode)
        missing = self.latents.missing(pictures)
        if missing:
            self._refuse_many(len(missing), len(pictures), "pictures", self.latents.others())
            self.latents.add(pictures, self.image_encoder.encode, at_once(pictures, self.batch_size))
        self.image_encoder.unload()
        return len(missing)

    def _refuse_many(self, missing: int, total: int, what: str, others: Sequence[str]) -> None:
        there = f"; there are {'; '.join(others)}" if others else ""
        found = f"{missing} of {total} {what} are not in {self.cache.remote or self.cache.folder}"
        if self.cache.remote:
            url = str(self.cache.remote).rpartition("/")[0]
            raise ValueError(
                f"{found}, from where features are only read{there}. Encode them into a folder here, and upload what "
                f"is in it to {url}:\n    {cache_command()} --data.cache_dir FOLDER"
            )
        if missing > self.max_to_encode:
            raise ValueError(
                f"{found}, more than data.max_prompts_to_encode ({self.max_to_encode}){there}. Encode them first, on "
                f"all devices:\n    {cache_command()}"
            )

    def _report(self, texts: Sequence[str], computed: int, num_pictures: int) -> None:
        selection = self.selection
        num_train = sum(len(source.prompts) for source in selection.train)
        manifest = self.cache.open()
        each = manifest.num_bytes // max(manifest.num_items, 1)
        rank_zero_info(
            f"prompts: {num_train} to train, {len(selection.evaluation)} to evaluate; text features: {computed} "
            f"computed, the rest cached in {self.cache.folder} ({each} bytes per prompt, "
            f"{self.cache.item_bytes} before compression)"
        )
        if selection.pictures:
            rank_zero_info(f"pictures: {len(selection.pictures)} to train on; latents: {num_pictures} computed")
        sets = [*selection.sets, selection.evaluation]
        for count, what in (
            (sum(own.num_empty for own in sets), "empty lines skipped"),
            (sum(own.num_duplicates for own in sets), "duplicates skipped"),
            (selection.num_in_both, "of those to evaluate are trained on too"),
        ):
            if count:
                rank_zero_info(f"prompts: {count} {what}")
        for line in lengths(texts, self.cache):
            rank_zero_info(line)


def with_negative(texts: Sequence[str], negative: str | None) -> list[str]:
    """Everything that is to be encoded: the prompts, and the text that guidance moves away from."""
    return list(dict.fromkeys([*texts, *([] if negative is None else [negative])]))


def lengths(texts: Sequence[str], cache: FeatureCache) -> list[str]:
    """How long prompts are, and how many are cut."""
    step = -(-len(texts) // SAMPLED)
    looked_at = list(texts[::step])
    counts = np.array(cache.encoder.num_tokens(looked_at))
    limit = cache.encoder.max_sequence_length
    median, most = np.percentile(counts, [50, 95])
    of = "" if step == 1 else f" (of {len(looked_at)} looked at)"
    lines = [f"prompts: {median:.0f} tokens in the median, {most:.0f} at 95 %, {counts.max()} at most, of {limit}{of}"]
    cut = np.flatnonzero(counts > limit)
    if len(cut):
        lines.append(
            f"prompts: {len(cut)} cut to the {limit} tokens that the text encoder reads{of}, first: "
            f"{looked_at[cut[0]][:80]!r}"
        )
    return lines


def cache_command() -> str:
    """What encodes everything, with the configuration files and what this process was told of model and data."""
    options = []
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c") or name.startswith(("--model", "--data")):
            options.append(f"{name} {shlex.quote(value if equals else following)}")
    return f"python -m srpo_lightning cache {' '.join(options or ['--config CONFIG'])}"
