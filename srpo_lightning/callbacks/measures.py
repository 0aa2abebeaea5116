"""What is measured of an evaluation sample: scores of the reward, the judge and further metrics, and statistics."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.evaluation.comparison import CONSISTENCY, HELD_OUT, LABEL, NOT_WON
from srpo_lightning.evaluation.metrics import is_in_top, most_like
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.picture_statistics import (
    CLIP_STATISTICS,
    PICTURE_STATISTICS,
    SCORED_FRAMES,
    STATISTICS,
    consistency,
    evenly,
    over_frames,
)
from srpo_lightning.rewards.base import Reward, evaluated_by
from srpo_lightning.rewards.clip import ClipReward

VERSION = 2
"""Raised when a number of a sample is measured otherwise, so that those of before and after are not compared."""

OF_JUDGE = ("judge", "prompt")
SCORES = ("reward", *OF_JUDGE)
OWN_COLUMNS = (*SCORES, *PICTURE_STATISTICS, LABEL, HELD_OUT)
OF_ALL_SAMPLES = ("diversity", "share", "drift", "win", "prompt_diversity")


class Measures:
    """The judge and the metrics, and the numbers that every sample gets by them.

    Args:
        judge: see `RewardTracking`, as all others.
        labels: texts to tell images apart by.
        candidates: prompt files.
        top_k: number of best candidates.
        metrics: further reward models by name.
        held_out: weights of scores by name.
        form: form of the reward; None: the objective's.

    Attributes:
        has_clips: Whether samples are clips; known once the models are loaded.
        frame_encoder: What consistency between frames is measured by, of clips.
    """

    def __init__(
        self,
        judge: Reward | None,
        labels: Sequence[str],
        candidates: Sequence[str],
        top_k: int,
        metrics: dict[str, Reward] | None,
        held_out: dict[str, float] | None,
        form: RewardForm | None,
    ) -> None:
        if judge is not None:
            judge.check_contrast()
        self.judge = judge
        self.form = form
        self.scorers = metrics or {}
        self.labels = list(labels)
        self.candidates = [prompt for path in candidates for prompt in read_prompts(path).prompts]
        self.top_k = top_k
        self.top = f"top{top_k}"
        default = {} if judge is None else dict.fromkeys(OF_JUDGE, 1.0)
        self.held_out = default if held_out is None else held_out
        self._check(is_own=held_out is not None)
        self.has_clips = False
        self.frame_encoder: ClipReward | None = None

    def _check(self, is_own: bool) -> None:
        """Refuse what cannot be measured, or says nothing.

        Args:
            is_own: Whether `held_out` was given.
        """
        if self.judge is None and (self.labels or self.candidates):
            raise ValueError("labels and candidates are compared by the judge, and there is none: give one, or neither")
        taken = self.scorers.keys() & {*OWN_COLUMNS, *CLIP_STATISTICS, CONSISTENCY, self.top, *OF_ALL_SAMPLES}
        if taken:
            meant = "".join(f" ({STATISTICS[name].meaning})" for name in taken & STATISTICS.keys())
            raise ValueError(f"metrics has {', '.join(taken)}, which is logged already{meant}: choose another name")
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels is {self.labels}: give two or more, all different, or none")
        if self.candidates and self.top_k >= len(self.candidates):
            of = f"{self.top_k} of {len(self.candidates)} candidates"
            raise ValueError(f"top_k is {of}: every picture would be right; set it below")
        if self.held_out and not any(self.held_out.values()):
            raise ValueError("held_out has weights of 0 alone: give at least one score another, for instance judge: 1")
        of_judge = () if self.judge is None else (*OF_JUDGE, *([self.top] if self.candidates else []))
        unknown = self.held_out.keys() - {*of_judge, *self.scorers}
        if unknown or (is_own and not self.held_out):
            known = f"{', '.join(of_judge)} and the names" if of_judge else "the names (there is no judge)"
            raise ValueError(
                f"held_out has {', '.join(sorted(unknown)) or 'nothing'}: choose among {known} in metrics "
                f"({', '.join(self.scorers) or 'there are none'})"
            )

    @property
    def models(self) -> list[Reward]:
        """The judge and the other metrics."""
        return [*([] if self.judge is None else [self.judge]), *self.scorers.values()]

    @property
    def columns(self) -> list[str]:
        """The numbers that every sample gets."""
        missing = set() if self.labels else {LABEL}
        missing |= set() if self.held_out else {HELD_OUT}
        missing |= set(OF_JUDGE) if self.judge is None else set()
        own = [name for name in OWN_COLUMNS if name not in missing]
        of_clips = [*CLIP_STATISTICS, *([CONSISTENCY] if self.frame_encoder else [])] if self.has_clips else []
        return [*own, *of_clips, *([self.top] if self.candidates else []), *self.scorers]

    @property
    def has_features(self) -> bool:
        """Whether the judge has features of images, by which diversity and drift are measured."""
        return isinstance(self.judge, ClipReward)

    def numbers(self, samples_per_prompt: int) -> list[str]:
        """The names of what is written of each kind of weights, once it is compared with the base."""
        scores = [name for name in self.columns if name != LABEL]
        features = ["diversity", "drift"] if self.has_features else []
        features += ["prompt_diversity"] if features and samples_per_prompt > 1 else []
        wins = [f"win/{name}" for name in scores if name not in NOT_WON]
        return [*scores, *(f"share/{label}" for label in self.labels), *features, *wins]

    def load(self, module: SRPOModule) -> None:
        """Read the weights of judge and metrics, for the samples of a module."""
        num_frames = module.policy.num_frames
        for model in self.models:
            model.check_frames(num_frames)
        self.has_clips = num_frames > 1
        self.frame_encoder = encoder_of_pictures([*self.models, module.reward]) if self.has_clips else None
        for model in self.models:
            model.load()
            model.requires_grad_(False)

    def move_models(self, device: torch.device) -> None:
        """Put judge and metrics on a device."""
        for model in self.models:
            model.to(device)

    def features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The judge's features [B, E], of a clip their mean over scored frames; and what those of all frames say."""
        judge, encoder = self.judge, self.frame_encoder
        each = None if encoder is None else torch.stack([encoder.image_features(own) for own in images.unbind(2)])
        of_clips = {} if each is None else {CONSISTENCY: consistency(each)}
        if not isinstance(judge, ClipReward):
            return images.new_empty(len(images), 0), of_clips
        if each is None or judge is not encoder:
            return judge.image_features(images), of_clips
        return each[evenly(SCORED_FRAMES, len(each))].mean(0), of_clips

    def scores(self, module: SRPOModule, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The numbers of each image, [B], by column; of a clip means over its frames, unless a model reads clips."""
        form = self.form or module.objective
        whole = range(module.policy.num_frames)
        measures: dict[str, tuple[Reward, Callable[[Tensor], Tensor]]] = {
            "reward": (module.reward, lambda shown: form.score(module.reward, shown, prompts)),
            **{name: (scorer, scorer.under(prompts)) for name, scorer in self.scorers.items()},
        }
        scores: dict[str, Any] = {
            name: evaluated_by(model, images, module.policy.shown_frames if name == "reward" else whole, measure)
            for name, (model, measure) in measures.items()
        }
        scores |= {name: over_frames(images, own.measure) for name, own in PICTURE_STATISTICS.items()}
        if self.judge is not None:
            by_judge = partial(evaluated_by, self.judge, images, whole)
            scores |= self._judged(self.judge, by_judge, form, prompts)
        if self.has_clips:
            scores |= {name: own.measure(images) for name, own in CLIP_STATISTICS.items()}
        if self.held_out:
            scores[HELD_OUT] = sum(weight * scores[name] for name, weight in self.held_out.items())
        return scores

    def _judged(
        self, judge: Reward, by_judge: Callable[[Callable[[Tensor], Tensor]], Tensor], form: Any, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        scores = {
            "judge": by_judge(lambda shown: form.score(judge, shown, prompts)),
            "prompt": by_judge(judge.under(prompts)),
        }
        if self.candidates:
            texts = list(dict.fromkeys([*self.candidates, *prompts]))
            compared = by_judge(lambda shown: judge.compare(shown, texts))
            truth = torch.tensor([texts.index(prompt) for prompt in prompts], device=compared.device)
            others = torch.arange(len(texts), device=compared.device) >= len(set(self.candidates))
            others = others & (torch.arange(len(texts), device=compared.device) != truth[:, None])
            scores[self.top] = is_in_top(compared.masked_fill(others, -torch.inf), truth, self.top_k)
        if self.labels:
            scores[LABEL] = most_like(by_judge(lambda shown: judge.compare(shown, self.labels)))
        return scores


def encoder_of_pictures(models: Iterable[Reward]) -> ClipReward | None:
    """The first model, or term of a sum, that has features of single pictures; None: there is none."""
    found = (own for model in models for own in model.modules() if isinstance(own, ClipReward) and not own.reads_clips)
    return next(found, None)
